from __future__ import annotations

import pytest
import torch

from kvfold import ops


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_vector_is_the_sum_of_one_codeword_a_stage(backend: str, dtype: torch.dtype) -> None:
    batch, heads, tokens, stages, groups, size, dim = 2, 3, 4, 3, 2, 7, 5
    codes = torch.randint(size, (batch, heads, tokens, stages, groups), dtype=torch.int32)
    codebooks, book = torch.randn(6, size, dim).to(dtype), torch.randint(6, (stages, heads, groups))
    vectors = ops.decode(codes, codebooks, book, backend)
    assert vectors.dtype == torch.float32
    assert vectors.shape == (batch, heads, tokens, groups, dim)
    for b, g, t, p in torch.cartesian_prod(*map(torch.arange, (batch, heads, tokens, groups))).tolist():
        expected = torch.zeros(dim)
        for s in range(stages):
            expected += codebooks[book[s, g, p], codes[b, g, t, s, p]].float()
        assert torch.equal(vectors[b, g, t, p], expected)


@pytest.mark.parametrize("size", [2, 257, 65536])
def test_encode_finds_what_decode_made_from_separate_codewords(backend: str, size: int) -> None:
    codebooks = torch.stack((torch.arange(size) // 256, torch.arange(size) % 256), 1).float()[None]
    codes = torch.randint(size, (1, 2, 9, 1, 3), dtype=torch.int32)
    book = torch.zeros(1, 2, 3, dtype=torch.int64)
    assert torch.equal(ops.encode(ops.decode(codes, codebooks, book, backend), codebooks, book, 1, backend), codes)


def test_no_codes_no_vectors(backend: str) -> None:
    codes = torch.zeros(1, 2, 0, 3, 2, dtype=torch.int32)
    assert ops.decode(codes, torch.randn(3, 4, 5), torch.zeros(3, 2, 2, dtype=torch.int64), backend).shape == (1, 2, 0, 2, 5)
