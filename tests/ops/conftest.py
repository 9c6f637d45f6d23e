"""Every law of an op runs for every backend there is."""

from __future__ import annotations

import pytest

from kvfold import ops


@pytest.fixture(params=ops.available_backends(), scope="module")
def backend(request: pytest.FixtureRequest) -> str:
    return request.param
