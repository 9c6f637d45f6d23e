"""The whole encoding of vectors by every backend: scales as defined, and codes that decode as well as the search's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvfold import ops
from kvfold.packing import packed_bytes, unpack

HEADS, GROUPS, DIM, STAGES = 2, 3, 8, 4


def setting(size: int = 20) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codebooks, book, channels in any order, and weights."""
    codebooks = torch.randn(STAGES * HEADS * GROUPS, size, DIM) * 0.5
    book = torch.randperm(len(codebooks)).view(STAGES, HEADS, GROUPS)
    return codebooks, book, torch.randperm(GROUPS * DIM).view(GROUPS, DIM), torch.randn(HEADS, GROUPS, DIM, DIM)


@pytest.mark.parametrize("scale_bits", [8, 16])
@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", [20, 256])
def test_codes_and_scales_are_those_of_the_definition(
    backend: str, size: int, weighted: bool, beam: int, scale_bits: int
) -> None:
    codebooks, book, channels, weights = setting(size)
    x = torch.randn(2, HEADS, 70, GROUPS * DIM) * torch.logspace(-3, 3, 70)[:, None]
    bits = (size - 1).bit_length()
    how = (codebooks, book, channels, weights if weighted else None, bits, beam, scale_bits)
    (packed, scale), (right, right_scale) = (ops.code(x, *how, backend=name) for name in (backend, "naive"))
    assert packed.shape == (2, HEADS, 70, packed_bytes(STAGES * GROUPS, bits))
    assert scale.dtype == right_scale.dtype
    assert float((scale != right_scale).float().mean()) < 0.01  # of a deviation that lies between two steps
    codes, right_codes = (unpack(rows, bits, STAGES * GROUPS) for rows in (packed, right))
    assert float((codes != right_codes).float().mean()) < 0.01  # near-ties


def test_a_vector_has_the_same_codes_in_any_company(backend: str) -> None:
    codebooks, book, channels, weights = setting(256)
    x = torch.randn(1, HEADS, 130, GROUPS * DIM)
    whole = ops.code(x, codebooks, book, channels, weights, 8, 2, 8, backend=backend)
    for start, stop in ((0, 1), (3, 10), (64, 130)):
        part = ops.code(x[:, :, start:stop], codebooks, book, channels, weights, 8, 2, 8, backend=backend)
        same = [float((mine == all_of[:, :, start:stop]).float().mean()) for mine, all_of in zip(part, whole, strict=True)]
        assert same == [1.0, 1.0] if backend == "cpu" else min(same) > 0.98


def test_vectors_of_zeros_constants_and_extremes_have_scales(backend: str) -> None:
    codebooks, book, channels, _ = setting()
    x = torch.zeros(1, HEADS, 4, GROUPS * DIM)
    x[:, :, 1], x[:, :, 2, 0], x[:, :, 3, 0] = -3.0, 1e30, 1e-30
    for scale_bits, largest in ((16, 65504.0), (8, 61440.0)):
        _, scale = ops.code(x, codebooks, book, channels, None, 5, 1, scale_bits, backend=backend)
        _, right = ops.code(x, codebooks, book, channels, None, 5, 1, scale_bits, backend="naive")
        assert torch.equal(scale, right)
        found = scale if scale_bits == 16 else (scale.int() << 7).to(torch.int16).view(torch.float16)
        assert found[0, 0, :, 0].tolist() == [0.0, 3.0, largest, 0.0]
