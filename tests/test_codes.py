"""Codes of blocks (`kvfold/codes.py`)."""

from __future__ import annotations

import math

import pytest
import torch

from kvfold.codes import stripe, unstripe


@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8, torch.int64])
@pytest.mark.parametrize(("block", "shape"), [(1, (3,)), (4, (8, 2)), (4, (3,)), (32, (5, 1, 2)), (7, (1,))])
@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_unstripe_inverts_stripe(dtype: torch.dtype, block: int, shape: tuple[int, ...], blocks: int) -> None:
    common = torch.randint(0, 100, (2, 3, blocks, *shape)).to(dtype)
    striped = stripe(common, block)
    size = -(-math.prod(shape) * dtype.itemsize // block)
    assert striped.dtype == torch.uint8
    assert striped.shape == (2, 3, blocks * block, size)
    assert torch.equal(unstripe(striped, block, dtype, shape), common)


def test_a_whole_block_can_be_cut_out() -> None:
    common = torch.randn(1, 2, 5, 6).half()
    assert torch.equal(unstripe(stripe(common, 4)[:, :, 8:16], 4, torch.float16, (6,)), common[:, :, 2:4])
