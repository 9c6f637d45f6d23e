"""Random codes, as the tests of attention take them, and what they compare."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvfold import ops
from kvfold.packing import pack

# Root mean square of the difference over that of the output, of compiled ops that use no integers: float32, or its halves on
# the matrix unit.
EXACT_ERROR = 3e-5


def scattered(batch: int, heads: int, tokens: int, dim: int = 16, group: int = 8, size: int = 20, stages: int = 3) -> ops.Coded:
    """Random codes on channels in any order, every head and group with codebooks in any order."""
    groups, bits = dim // group, (size - 1).bit_length()
    packed = pack(torch.randint(size, (batch, heads, tokens, stages * groups)), bits)
    book = torch.randint(stages + 1, (stages, heads, groups))
    scale = (torch.rand(batch, heads, tokens, 1) + 0.5).half()
    codebooks = torch.randn(stages + 1, size, group).half()
    return ops.Coded(packed, scale, codebooks, book, torch.randperm(dim).view(groups, group), bits)


def coded(
    batch: int,
    heads: int,
    tokens: int,
    dim: int = 128,
    *,
    size: int = 256,
    stages: int = 8,
    strided: bool = False,
    own: str = "",
) -> ops.Coded:
    """Random codes in groups of 32, the shape the fast ways are made for; `own` books of "heads" or "groups"."""
    groups, bits = dim // 32, (size - 1).bit_length()
    stage = torch.arange(stages).view(-1, 1, 1)
    sharing = {"heads": torch.arange(heads).view(1, -1, 1), "groups": torch.arange(groups)}.get(own, torch.zeros(1).long())
    book = (stage * (int(sharing.max()) + 1) + sharing).expand(-1, heads, groups).contiguous()
    deviation = 0.8 ** (torch.arange(int(book.max()) + 1) // (int(sharing.max()) + 1))
    codebooks = (torch.randn(len(deviation), size, 32) * deviation[:, None, None] * 0.6).half()
    packed = pack(torch.randint(size, (batch, heads, tokens, stages * groups), dtype=torch.int32), bits)
    scale = (torch.rand(batch, heads, tokens, 1) + 0.5).half()
    order = torch.arange(dim)
    channels = order.view(32, groups).T.contiguous() if strided else order.view(groups, 32)
    return ops.Coded(packed, scale, codebooks, book, channels, bits)


def rotation(tokens: int, dim: int) -> ops.Rotation:
    positions = torch.arange(tokens, dtype=torch.int32)[None]
    return ops.Rotation(positions, 1e4 ** -(torch.arange(dim // 2) / (dim // 2)), 1.1, False)


def both(*arguments: object, **named: object) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What the compiled op says of attention, and its naive twin."""
    return ops.attend(*arguments, **named, backend="cpu"), ops.attend(*arguments, **named, backend="naive")


def thread_counts(backend: str) -> Iterator[int]:
    """One thread, then three for the backend that shares work out among them; set while the loop's body runs."""
    before = torch.get_num_threads()
    try:
        for threads in (1, 3) if backend == "cpu" else (1,):
            torch.set_num_threads(threads)
            yield threads
    finally:
        torch.set_num_threads(before)
