"""Exact tokens with new ones behind them."""

from __future__ import annotations

import pytest
import torch

from kvfold import ops
from kvfold.errors import InputError


def tokens(count: int, dtype: torch.dtype, batch: int = 2, dim: int = 24) -> torch.Tensor:
    """As a model's projections leave them: heads between tokens."""
    return torch.randn(batch, count, 3, dim).to(dtype).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("held", "new"), [(0, 1), (70, 1), (5, 600), (0, 1025), (3, 0)])
def test_new_tokens_lie_behind_those_held(backend: str, dtype: torch.dtype, held: int, new: int) -> None:
    keys, new_keys, new_values = tokens(held, dtype), tokens(new, dtype), tokens(new, dtype, dim=40)
    values = tokens(held + 9, dtype, dim=40)[:, :, 4 : held + 4]
    for given in ((keys, values), (keys.contiguous(), values.contiguous())):
        got = ops.extend(*given, new_keys, new_values, backend=backend)
        assert torch.equal(got[0], torch.cat((keys, new_keys), 2))
        assert torch.equal(got[1], torch.cat((values, new_values), 2))
        assert got[0].dtype == dtype
        assert got[0].is_contiguous()
        assert got[1].is_contiguous()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_is_refused(backend: str, side: int, dtype: torch.dtype, bad: float) -> None:
    for at in (0, 699):
        new = [tokens(700, dtype), tokens(700, dtype)]
        new[side][1, 2, at, 23] = bad
        with pytest.raises(InputError, match="NaN"):
            ops.extend(tokens(4, dtype), tokens(4, dtype), *new, backend=backend)
        ops.extend(tokens(4, dtype), tokens(4, dtype), *new, checked=False, backend=backend)
    largest = torch.full((1, 3, 5, 24), torch.finfo(dtype).max, dtype=dtype)  # whose sum is not finite
    ops.extend(largest, largest, largest, largest, backend=backend)


def test_gradients_reach_what_was_added(backend: str) -> None:
    new = tokens(2, torch.float32).requires_grad_()
    keys, values = ops.extend(tokens(3, torch.float32), tokens(3, torch.float32), new, new, backend=backend)
    (keys.sum() + 2 * values.sum()).backward()
    assert new.grad is not None
    assert torch.equal(new.grad, torch.full_like(new, 3.0))


@pytest.mark.parametrize("shape", [(1, 3, 4, 24), (2, 2, 4, 24), (2, 3, 4, 16)], ids=str)
def test_tokens_of_another_shape_are_refused(backend: str, shape: tuple[int, ...]) -> None:
    with pytest.raises((ValueError, RuntimeError), match=r"[Ss]hape|[Ss]izes"):
        ops.extend(torch.zeros(shape), torch.zeros(shape), *[tokens(1, torch.float32)] * 2, backend=backend)
