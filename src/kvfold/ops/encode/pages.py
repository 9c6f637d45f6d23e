"""Coding of a forward pass's keys and values straight into pages, as a serving engine keeps them.

The definition: keys are taken back to before RoPE, both sides are coded (`code.py`), and what is stored of a token goes to its
slot. On a CPU that is one C++ op for both sides (csrc/code.cpp): a decode step has few tokens, and a dozen operations for them
take longer than they do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from kvfold.errors import non_finite
from kvfold.ops.attend.naive import Rotation
from kvfold.ops.rope import unrotate


class Coder(NamedTuple):
    """How a side is coded: what `code.code` is told behind the vectors."""

    codebooks: Tensor
    book: Tensor
    channels: Tensor
    weights: Tensor | None
    bits: int
    beam: int
    scale_bits: int


class Stored(NamedTuple):
    """A side's fields of all pages: packed uint8 `[N, G, block, bytes]` and scale `[N, G, block, 1]`, views with any strides
    whose bytes lie together."""

    packed: Tensor
    scale: Tensor


def code_pages(
    code: Callable,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    rotation: Rotation | None,
    coders: tuple[Coder, Coder],
    stored: tuple[Stored, Stored],
) -> None:
    """Code keys and values into pages.

    Args:
        code: the op that codes a side, as `ops.code`.
        keys, values: `[T, G, D]`, keys after RoPE.
        slots: int64 `[T]`, page * block + place in it; a token of negative slot is not kept.
        rotation: of positions `[1, T]`, if keys are coded before RoPE.
        coders, stored: of keys and of values.

    Raises:
        InputError: NaN or Inf in keys or values (not asked for on a GPU); what their slots hold then is nothing to be read.
    """
    keys, values = (x.transpose(0, 1)[None].float() for x in (keys, values))
    if not keys.is_cuda and not all(bool(x.isfinite().all()) for x in (keys, values)):
        raise non_finite()
    if rotation is not None:
        keys = unrotate(keys, *rotation)
    kept = slots >= 0
    for x, coder, to in zip((keys, values), coders, stored, strict=True):
        block = to.packed.shape[2]
        page, place = slots[kept] // block, slots[kept] % block
        for field, fresh in zip(to, code(x, *coder), strict=True):
            field[page, :, place] = fresh[0, :, kept].transpose(0, 1)
