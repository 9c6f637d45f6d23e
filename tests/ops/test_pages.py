"""Attention of a decode step over codes in pages: what attention over the same rows' codes is, one after the other."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from coded import coded, rotation, thread_counts
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from kvfold import ops
from kvfold.ops import native

BLOCK = 32


def paged(side: ops.Coded, other: ops.Coded, pages: int) -> tuple[ops.Coded, ops.Coded]:
    """Both sides' codes of one row, `[1, G, T, ...]`, as pages `[pages, G, BLOCK, ...]`, a token's fields together."""
    fields = [
        field[0].contiguous().view(torch.uint8).unflatten(1, (pages, BLOCK)).transpose(0, 1)
        for coded_side in (side, other)
        for field in (coded_side.packed, coded_side.scale)
    ]
    token = torch.cat((*fields, torch.full_like(fields[0][..., :2], 255)), -1)  # with room behind
    starts = torch.tensor([0, *(field.shape[-1] for field in fields)]).cumsum(0).tolist()
    parts = [token[..., start:stop] for start, stop in pairwise(starts)]
    first, second = (
        whole._replace(packed=parts[i], scale=parts[i + 1].view(whole.scale.dtype)) for whole, i in ((side, 0), (other, 2))
    )
    return first, second


def both(pages: int, heads: int, **how: bool) -> tuple[ops.Coded, ops.Coded]:
    return coded(1, heads, pages * BLOCK, 64, **how), coded(1, heads, pages * BLOCK, 64)


def rows_of(side: ops.Coded, pages: Tensor, length: int) -> ops.Coded:
    where = (pages[:, None] * BLOCK + torch.arange(BLOCK)).flatten()[:length]
    return side._replace(packed=side.packed[:, :, where], scale=side.scale[:, :, where])


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("lengths", [[700], [1, 500, 0, 32, 90, 431, 700]])
def test_every_row_reads_its_own_pages(backend: str, lengths: list[int], turned: bool, heads: int) -> None:
    key, value = both(40, heads, strided=turned)
    pages = torch.stack([torch.randperm(40)[:22] for _ in lengths])  # rows share pages
    table = pages.clone()
    for row, length in enumerate(lengths):
        table[row, -(-length // BLOCK) :] = 10**6  # behind the end there is anything
    query = torch.randn(len(lengths), 3 * heads, 64)
    turn = rotation(1000, 64) if turned else None
    right = torch.zeros_like(query)
    for row, length in enumerate(lengths):
        if length:
            sides = rows_of(key, pages[row], length), rows_of(value, pages[row], length)
            own = None if turn is None else turn.slice(0, length)
            right[row] = ops.attend(query[row : row + 1, :, None], *sides, own, None, 0.1, backend=backend)[0][0, :, 0]
    for _ in thread_counts(backend):
        out = ops.attend_pages(query, *paged(key, value, 40), table, lengths, turn, 0.1, backend=backend)
        for got, want in zip(out, right, strict=True):
            assert torch.allclose(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


@pytest.mark.skipif(not native.available_isas(), reason=native.MISSING)
def test_torch_knows_the_op_and_its_shape() -> None:
    sides, table = paged(*both(8, 2, strided=True), 8), torch.randperm(8)[None]
    query, turn = torch.randn(1, 6, 64), rotation(200, 64)
    plain = ops.attend_pages(query, *sides, table, [200], turn, 0.1, backend="cpu")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = ops.attend_pages(mode.from_tensor(query), *sides, table, [200], turn, 0.1, backend="cpu")
    assert isinstance(out, FakeTensor)
    assert (out.shape, out.dtype) == (plain.shape, plain.dtype)
    parameter = torch.nn.Parameter(query, requires_grad=False)  # no plain tensor: goes through `torch.library`
    assert torch.equal(ops.attend_pages(parameter, *sides, table, [200], turn, 0.1, backend="cpu"), plain)


@pytest.mark.skipif(not native.available_isas(), reason=native.MISSING)
@pytest.mark.parametrize("page", [-1, 4, 2**31 - 1])
def test_a_page_that_is_not_there_is_refused(page: int) -> None:
    sides, table = paged(*both(4, 2), 4), torch.tensor([[0, page, 1]])
    with pytest.raises(ValueError, match="a page that is not there"):
        ops.attend_pages(torch.randn(1, 2, 64), *sides, table, [70], None, 1.0, backend="cpu")


@pytest.mark.skipif(not native.available_isas(), reason=native.MISSING)
def test_a_row_longer_than_its_pages_is_refused() -> None:
    sides = paged(*both(4, 2), 4)
    with pytest.raises(ValueError, match="longer than its pages"):
        ops.attend_pages(torch.randn(1, 2, 64), *sides, torch.tensor([[0, 1]]), [65], None, 1.0, backend="cpu")


@pytest.mark.skipif(not native.available_isas(), reason=native.MISSING)
def test_fields_of_a_token_lie_together() -> None:
    key, value = paged(*both(4, 2), 4)
    apart = value._replace(packed=value.packed.contiguous())
    with pytest.raises(ValueError, match="lie together in a token"):
        ops.attend_pages(torch.randn(1, 2, 64), key, apart, torch.tensor([[0, 1]]), [40], None, 1.0, backend="cpu")
