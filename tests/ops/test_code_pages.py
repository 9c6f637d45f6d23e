"""Coding straight into pages: what coding the same vectors is, put where it belongs, and nothing else touched."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from coded import rotation, thread_counts
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kvfold import ops
from kvfold.errors import InputError
from kvfold.ops import native
from kvfold.packing import packed_bytes

HEADS, DIM, BLOCK, PAGES = 3, 64, 8, 20
needs_native = pytest.mark.skipif(not native.available_isas(), reason=native.MISSING)


def coder(size: int, stages: int, scale_bits: int, beam: int, weighted: bool = False) -> ops.Coder:
    groups = DIM // 32
    codebooks = torch.randn(stages * HEADS * groups, size, 32) * 0.5
    book = torch.randperm(len(codebooks)).view(stages, HEADS, groups)
    weights = torch.randn(HEADS, groups, 32, 32) * 0.2 if weighted else None
    channels = torch.arange(DIM).view(32, groups).T.contiguous()
    return ops.Coder(codebooks, book, channels, weights, (size - 1).bit_length(), beam, scale_bits)


def poisoned(*coders: ops.Coder) -> tuple[Tensor, tuple[ops.Stored, ...]]:
    """Pages of 255s with room behind a token, and the views of both sides."""
    sizes = [
        size for own in coders for size in (packed_bytes(own.book.shape[0] * own.book.shape[2], own.bits), own.scale_bits // 8)
    ]
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    pages = torch.full((PAGES, HEADS, BLOCK, starts[-1] + 4), 255, dtype=torch.uint8)
    parts = [pages[..., start:stop] for start, stop in pairwise(starts)]
    scales = [part if own.scale_bits == 8 else part.view(torch.float16) for part, own in zip(parts[1::2], coders, strict=True)]
    return pages, tuple(ops.Stored(packed, scale) for packed, scale in zip(parts[::2], scales, strict=True))


def settings(**how: bool) -> tuple[ops.Coder, ops.Coder]:
    return coder(256, 4, 8, 1, **how), coder(16, 3, 16, 2, **how)  # fields of even size: a scale of two bytes needs its place


@pytest.mark.parametrize("tokens", [1, 8, 150])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_codes_are_those_of_coding_alone(backend: str, half: bool, turned: bool, tokens: int) -> None:
    coders = settings(weighted=turned)
    coders = (coders[0]._replace(beam=1 + turned), coders[1])
    given = torch.randn(2, tokens, 2 * HEADS, DIM)[:, :, ::2]  # with gaps, as slices of a projection have them
    keys, values = (given.bfloat16() if half else given).unbind()
    slots = torch.randperm(PAGES * BLOCK)[:tokens]
    turn = rotation(900, DIM).slice(900 - tokens, 900) if turned else None
    plain, expected = poisoned(*coders)
    for x, own, to, turns in zip((keys, values), coders, expected, (turn, None), strict=True):
        x = x.transpose(0, 1)[None].float()
        x = x if turns is None else ops.unrotate(x, *turns, backend=backend)
        for field, fresh in zip(to, ops.code(x, *own, backend=backend), strict=True):
            field[slots // BLOCK, :, slots % BLOCK] = fresh[0].transpose(0, 1)
    for _ in thread_counts(backend):
        pages, stored = poisoned(*coders)
        assert ops.code_pages(keys, values, slots, turn, coders, (stored[0], stored[1]), backend=backend) is None
        if backend == "gpu":  # few and many vectors take different ways there
            assert float((pages != plain).float().mean()) < 0.01
        else:
            assert torch.equal(pages, plain)


def test_tokens_without_a_slot_are_not_kept(backend: str) -> None:
    coders = settings()
    keys, values = torch.randn(2, 5, HEADS, DIM).unbind()
    pages, stored = poisoned(*coders)
    slots = torch.tensor([-1, 7, -1, 33, -1])
    ops.code_pages(keys, values, slots, None, coders, (stored[0], stored[1]), backend=backend)
    written = (pages != 255).any(-1).any(1).flatten().nonzero().flatten()
    assert written.tolist() == [7, 33]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_is_refused(backend: str, side: int, wrong: float) -> None:
    if torch.cuda.is_available() and backend in ("naive", "gpu"):
        pytest.skip("not asked for on a GPU, which would have to be waited for")
    coders = settings()
    given = torch.randn(2, 40, HEADS, DIM)
    given[side, 33, 1, 5] = wrong
    _, stored = poisoned(*coders)
    with pytest.raises(InputError, match="NaN or Inf"):
        ops.code_pages(*given.unbind(), torch.arange(40), None, coders, (stored[0], stored[1]), backend=backend)


@needs_native
def test_a_slot_that_is_not_there_is_refused() -> None:
    coders = settings()
    keys, values = torch.randn(2, 3, HEADS, DIM).unbind()
    pages, stored = poisoned(*coders)
    with pytest.raises(ValueError, match="a page that is not there"):
        ops.code_pages(keys, values, torch.tensor([0, PAGES * BLOCK, 1]), None, coders, (stored[0], stored[1]), backend="cpu")
    assert bool((pages == 255).all())


@needs_native
@pytest.mark.parametrize(
    "wrong",
    [
        {"keys": torch.zeros(3, HEADS, 63)},
        {"values": torch.zeros(3, HEADS + 1, DIM)},
        {"values": torch.zeros(4, HEADS, DIM)},
        {"slots": torch.arange(4)},
        {"rotation": rotation(4, DIM)},
        {"rotation": rotation(3, 2 * DIM)},
        {"stored": 1},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_shapes_that_do_not_fit_are_refused(wrong: dict) -> None:
    coders = settings()
    _, (key, value) = poisoned(*coders)
    given = {"keys": torch.zeros(3, HEADS, DIM), "values": torch.zeros(3, HEADS, DIM), "slots": torch.arange(3)}
    given |= {"rotation": None, "coders": coders, "stored": (key, value)} | wrong
    if wrong.get("stored"):
        given["stored"] = (key, ops.Stored(value.packed[1:], value.scale))
    with pytest.raises(ValueError, match=r"shape of|slots|inv_freq"):
        ops.code_pages(**given, backend="cpu")


@needs_native
def test_torch_knows_the_op() -> None:
    coders = settings()
    keys, values = torch.randn(2, 3, HEADS, DIM).unbind()
    pages, (key, value) = poisoned(*coders)
    slots = torch.tensor([3, 1, 2])
    parameter = torch.nn.Parameter(keys, requires_grad=False)  # no plain tensor: goes through `torch.library`
    ops.code_pages(parameter, values, slots, None, coders, (key, value), backend="cpu")
    plain, stored = poisoned(*coders)
    ops.code_pages(keys, values, slots, None, coders, (stored[0], stored[1]), backend="cpu")
    assert torch.equal(pages, plain)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        ops.code_pages(mode.from_tensor(keys), values, slots, None, coders, (key, value), backend="cpu")
    assert torch.equal(pages, plain)
