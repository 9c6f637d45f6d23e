from __future__ import annotations

import pytest
import reference
import torch
from torch import Tensor

from kvfold import ops

DIM = 16
VARIANTS = pytest.mark.parametrize(
    ("rotary", "factor", "interleaved"),
    [(16, 1.0, False), (16, 1.0, True), (6, 1.0, False), (6, 1.0, True), (16, 1.37, False), (6, 0.7, True), (2, 1.0, False)],
)


def frequencies(rotary: int) -> Tensor:
    return 1e4 ** -(torch.arange(rotary // 2) / (rotary // 2))


@VARIANTS
def test_rotation_is_multiplication_by_a_complex_number(rotary: int, factor: float, interleaved: bool) -> None:
    x, positions = torch.randn(2, 3, 5, DIM), torch.randint(100, (2, 5))
    got = ops.rotate(x, positions, frequencies(rotary), factor, interleaved)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), reference.rotated(x, positions, frequencies(rotary), factor, interleaved), atol=1e-4)


@VARIANTS
@pytest.mark.parametrize("rows", [1, 2])
def test_unrotate_inverts_rotate(backend: str, rotary: int, factor: float, interleaved: bool, rows: int) -> None:
    x = torch.randn(2, 300, 3, DIM).transpose(1, 2)  # as models lay keys out
    positions = torch.randint(100_000, (rows, 300))
    arguments = (positions, frequencies(rotary), factor, interleaved)
    assert torch.allclose(ops.unrotate(ops.rotate(x, *arguments), *arguments, backend), x, atol=2e-6)
    assert torch.allclose(ops.rotate(ops.unrotate(x, *arguments, backend), *arguments), x, atol=2e-6)


def test_unrotate_takes_gradients(backend: str) -> None:
    x, positions = torch.randn(2, 3, 9, DIM, requires_grad=True), torch.arange(9)[None]
    got = ops.unrotate(x, positions, frequencies(16), 2.0, backend=backend)
    assert torch.allclose(torch.autograd.grad(got.square().sum(), x)[0], x / 2, atol=1e-5)


@VARIANTS
def test_lengths_grow_by_the_factor_and_other_channels_pass(rotary: int, factor: float, interleaved: bool) -> None:
    x, positions = torch.randn(2, 3, 9, DIM), torch.randint(1000, (2, 9))
    turned = ops.rotate(x, positions, frequencies(rotary), factor, interleaved)
    assert torch.allclose(turned[..., :rotary].norm(dim=-1), factor * x[..., :rotary].norm(dim=-1), rtol=1e-5)
    assert torch.equal(turned[..., rotary:], x[..., rotary:])


@VARIANTS
def test_scores_depend_on_the_distance_only(rotary: int, factor: float, interleaved: bool) -> None:
    query, key = torch.randn(1, 1, 1, DIM), torch.randn(1, 1, 1, DIM)

    def score(query_at: int, key_at: int) -> Tensor:
        q, k = (
            ops.rotate(x, torch.tensor([[at]]), frequencies(rotary), factor, interleaved)
            for x, at in ((query, query_at), (key, key_at))
        )
        return (q * k).sum()

    assert torch.allclose(score(50, 20), score(130, 100), atol=1e-4)
    assert not torch.allclose(score(50, 20), score(50, 21), atol=1e-4)


def test_each_row_and_token_turns_by_its_own_position() -> None:
    x, positions = torch.randn(2, 1, 4, DIM), torch.tensor([[0, 1, 2, 3], [0, 0, 0, 1]])
    turned = ops.rotate(x, positions, frequencies(DIM))
    assert torch.allclose(turned[:, :, 0], x[:, :, 0])
    assert torch.allclose(turned[1, :, :3], x[1, :, :3])
    alone = ops.rotate(x[1:, :, 3:], positions[1:, 3:], frequencies(DIM))
    assert torch.allclose(turned[1:, :, 3:], alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_turned_in_float32(dtype: torch.dtype) -> None:
    x, positions = torch.randn(1, 1, 4, DIM).to(dtype), torch.arange(4)[None]
    assert torch.equal(ops.rotate(x, positions, frequencies(DIM)), ops.rotate(x.float(), positions, frequencies(DIM)))
