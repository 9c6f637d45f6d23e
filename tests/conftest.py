"""What holds in every test: a seed, one thread, and memory that is poison until written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

from hypothesis import settings
from torch import Tensor

from kvfold.ops import native

settings.register_profile("kvfold", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("kvfold")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def poisoned_empty() -> Iterator[None]:
    """`torch.empty` and its kin hand out NaN and extreme integers, so that a read before a write shows."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty"), (native, "floats")):
            patch.setattr(owner, name, _poisoning(getattr(owner, name)))
        yield


def _poisoning(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def empty(*args: object, **kwargs: object) -> Tensor:
        tensor = function(*args, **kwargs)
        if tensor.device.type != "meta" and tensor.layout is torch.strided:
            with torch.no_grad():
                tensor.fill_(_poison(tensor.dtype))
        return tensor

    return empty


def _poison(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point or dtype.is_complex:
        return torch.nan
    return True if dtype is torch.bool else torch.iinfo(dtype).max
