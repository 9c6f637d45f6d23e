"""Every law of an op runs for every backend there is, the native one once an instruction set, Triton's in its interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kvfold import ops
from kvfold.ops import native

WAYS = [(name, isa) for name in ops.available_backends() for isa in (native.available_isas() if name == "cpu" else [""])]


@pytest.fixture(params=WAYS, ids="-".join, scope="module")
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name, isa = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVFOLD_CPU_ISA", isa)
        if name == "gpu" and torch.cuda.is_available():  # what tests make, they make there
            with torch.device("cuda"):
                yield name
        else:
            yield name


@pytest.fixture(params=native.available_isas() or ["none"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """For tests of the compiled ops alone: each instruction set in turn."""
    monkeypatch.setenv("KVFOLD_CPU_ISA", request.param)
    return request.param
