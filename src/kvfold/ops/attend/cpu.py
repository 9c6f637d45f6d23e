"""Attention in C++ (csrc/attend*.h): on codes, and on exact keys and values.

A few queries (a decode step) work on tables and never decode; see docs/performance.md for how. Error against the naive op,
root mean square over that of the output: 1e-3 for a few queries with AVX-512 (16-bit integers, of keys or of tables of scores),
1e-2 for many bfloat16 queries on a matrix unit (the precision of such a model's own attention), 3e-5 otherwise. Where
softmax weights vanish, values are left unread as long as the output provably changes by at most `SKIP` of its norm.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvfold.errors import InputError
from kvfold.ops import native
from kvfold.ops.attend.naive import Coded, Exact, Past, Rotation
from kvfold.ops.attend.spans import Mask, Spans

SKIP = 1e-4  # `KVFOLD_SKIP` sets another; 0 reads every value


def attend(
    query: Tensor,
    key: Coded,
    value: Coded,
    rotation: Rotation | None,
    mask: Mask | None,
    softmax_scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """As `naive.attend`; ValueError for a code that names no codeword."""
    return attend_both(query, Past(key, value, rotation), mask, None, softmax_scale, softcap)


def attend_both(
    query: Tensor,
    past: Past,
    mask: Mask | None,
    exact: Exact | None,
    softmax_scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """As `naive.attend_both`, in one call; ValueError for a code that names no codeword."""
    exact_keys, exact_values, exact_mask = exact or (None, None, None)
    given = _seen(mask), exact_keys, exact_values, _seen(exact_mask), softmax_scale, softcap or 0.0, _skip()
    if native.eager(query):
        return _attend_past(query, _ready(past), past.value.channels, *given)
    positions, inv_freq, factor, interleaved = past.rotation or (None, None, 1.0, False)
    places = past.key.center, positions, inv_freq, factor, interleaved
    return torch.ops.kvfold.attend_codes(query, *_fields(past.key), *_fields(past.value), *places, *given)


def attend_exact(
    query: Tensor, keys: Tensor, values: Tensor, mask: Mask | None, softmax_scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """As `naive.attend_exact`."""
    return torch.ops.kvfold.attend_exact(query, keys, values, _seen(mask), softmax_scale, softcap or 0.0)


def attend_pages(
    query: Tensor,
    key: Coded,
    value: Coded,
    table: Tensor,
    lengths: Sequence[int],
    rotation: Rotation | None,
    softmax_scale: float,
    softcap: float | None = None,
) -> Tensor:
    """As `pages.attend_pages`; ValueError for a page that is not there, or a token whose fields do not lie together."""
    positions, inv_freq, factor, interleaved = rotation or (None, None, 1.0, False)
    run: Callable[..., Tensor] = _attend_pages if native.eager(query) else torch.ops.kvfold.attend_pages
    return run(
        *(query, table, list(lengths), *_fields(key), *_fields(value)),
        *(key.center, positions, inv_freq, factor, interleaved, softmax_scale, softcap or 0.0, _skip()),
    )


def _fields(coded: Coded) -> tuple:
    """What the op in torch's library is told of a side (`_SIDES`)."""
    return coded.packed, coded.scale, coded.codebooks, coded.book, coded.channels, coded.bits


def _seen(mask: Mask | None) -> Tensor | None:
    """What the op in torch's library is told of a mask: bytes `[B or 1, 1, Q, T]`, or spans' bounds, int32 `[Q, n, 2]`."""
    if isinstance(mask, Spans):
        return mask.bounds
    return None if mask is None else mask.view(torch.uint8)


def _skip() -> float:
    given = os.environ.get("KVFOLD_SKIP")
    return _number(given) if given else SKIP


@cache
def _number(given: str) -> float:
    try:
        skip = float(given)
    except ValueError:
        skip = -1.0
    if not 0 <= skip < 1:
        raise InputError("KVFOLD_SKIP from 0 to below 1", repr(given), "unset it or choose such a number")
    return skip


def _attend_codes(
    query: Tensor,
    key_packed: Tensor,
    key_scale: Tensor,
    key_codebooks: Tensor,
    key_book: Tensor,
    key_channels: Tensor,
    key_bits: int,
    value_packed: Tensor,
    value_scale: Tensor,
    value_codebooks: Tensor,
    value_book: Tensor,
    value_channels: Tensor,
    value_bits: int,
    key_center: Tensor | None,
    positions: Tensor | None,
    inv_freq: Tensor | None,
    factor: float,
    interleaved: bool,
    *given: Any,
) -> tuple[Tensor, Tensor]:
    key = Coded(key_packed, key_scale, key_codebooks, key_book, key_channels, key_bits, key_center)
    value = Coded(value_packed, value_scale, value_codebooks, value_book, value_channels, value_bits)
    rotation = None if positions is None or inv_freq is None else Rotation(positions, inv_freq, factor, interleaved)
    return _attend_past(query, _ready(Past(key, value, rotation)), value_channels, *given)


def _ready(past: Past) -> Any:
    """The module's `Past`, made anew if codebooks were written to since, or another module is in use."""
    module, key = native.module(), past.key
    now = module, native.version(key.codebooks), native.version(past.value.codebooks)
    if past.ready is None or past.ready[0] != now:
        positions, inv_freq, factor, interleaved = past.rotation or (None, None, 1.0, False)
        places = (
            None if key.center is None else native.dense(key.center, torch.float32),
            None if positions is None else native.dense(positions, torch.int32),
            None if inv_freq is None else native.dense(inv_freq, torch.float32),
        )
        made = module.Past(*_side(*_fields(key)), *_side(*_fields(past.value)), *places, factor, interleaved)
        past.ready = now, made
    return past.ready[1]


def _attend_past(
    query: Tensor,
    ready: Any,
    value_channels: Tensor,
    mask: Tensor | None,
    exact_keys: Tensor | None,
    exact_values: Tensor | None,
    exact_mask: Tensor | None,
    softmax_scale: float,
    softcap: float,
    skip: float,
) -> tuple[Tensor, Tensor]:
    array = native.array
    out, lse = _results(query, value_channels.numel(), native.floats)
    ready.attend(
        _query(query),
        None if mask is None else array(mask),
        None if exact_keys is None else array(_read(exact_keys)),
        None if exact_values is None else array(_read(exact_values)),
        None if exact_mask is None else array(exact_mask),
        softmax_scale,
        softcap,
        skip,
        torch.get_num_threads(),
        array(out),
        array(lse),
    )
    return out, lse


def _attend_pages(
    query: Tensor,
    table: Tensor,
    lengths: list[int],
    key_packed: Tensor,
    key_scale: Tensor,
    key_codebooks: Tensor,
    key_book: Tensor,
    key_channels: Tensor,
    key_bits: int,
    value_packed: Tensor,
    value_scale: Tensor,
    value_codebooks: Tensor,
    value_book: Tensor,
    value_channels: Tensor,
    value_bits: int,
    key_center: Tensor | None,
    positions: Tensor | None,
    inv_freq: Tensor | None,
    factor: float,
    interleaved: bool,
    softmax_scale: float,
    softcap: float,
    skip: float,
) -> Tensor:
    array, dense, longest = native.array, native.dense, max(lengths, default=0)
    out = native.floats(*query.shape[:2], value_channels.numel())
    native.module().attend_pages(
        _query(query),
        array(table.to(torch.int32)),
        array(torch.tensor(lengths, dtype=torch.int32)),
        *_side(key_packed, key_scale, key_codebooks, key_book, key_channels, key_bits),
        *_side(value_packed, value_scale, value_codebooks, value_book, value_channels, value_bits),
        None if key_center is None else dense(key_center, torch.float32),
        None if positions is None else dense(positions[:, :longest], torch.int32),
        None if inv_freq is None else dense(inv_freq, torch.float32),
        factor,
        interleaved,
        softmax_scale,
        softcap,
        skip,
        torch.get_num_threads(),
        array(out),
    )
    return out


def _attend_exact(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, softmax_scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    array = native.array
    out, lse = _results(query, values.shape[-1], native.floats)
    native.module().attend_exact(
        _query(query),
        array(_read(keys)),
        array(_read(values)),
        None if mask is None else array(mask),
        softmax_scale,
        softcap,
        torch.get_num_threads(),
        array(out),
        array(lse),
    )
    return out, lse


def _side(packed: Tensor, scale: Tensor, codebooks: Tensor, book: Tensor, channels: Tensor, bits: int) -> tuple:
    """What the C++ op is told of a side."""
    return native.array(packed), native.array(scale), bits, native.books(codebooks, book, channels)


def _query(query: Tensor) -> Any:
    return native.array(_read(query if query.is_contiguous() else query.contiguous()))


def _read(tensor: Tensor) -> Tensor:
    """Queries, exact keys or values, of a type that the C++ op reads."""
    return tensor if tensor.dtype in (torch.float32, torch.bfloat16) else tensor.float()


def _results(query: Tensor, dim: int, empty: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    rows = query.shape[:3]
    return empty(*rows, dim), empty(*rows)


_SIDES = "".join(
    f"Tensor {side}_packed, Tensor {side}_scale, Tensor {side}_codebooks, Tensor {side}_book, "
    f"Tensor {side}_channels, int {side}_bits, "
    for side in ("key", "value")
)
_PLACES = "Tensor? key_center, Tensor? positions, Tensor? inv_freq, float factor, bool interleaved, "
_SOFTMAX = "float softmax_scale, float softcap, float skip"
native.LIBRARY.define(
    f"attend_codes(Tensor query, {_SIDES}{_PLACES}Tensor? mask, "
    f"Tensor? exact_keys, Tensor? exact_values, Tensor? exact_mask, {_SOFTMAX}) -> (Tensor, Tensor)"
)
native.LIBRARY.impl("attend_codes", _attend_codes, "CPU")
native.LIBRARY.define(f"attend_pages(Tensor query, Tensor table, int[] lengths, {_SIDES}{_PLACES}{_SOFTMAX}) -> Tensor")
native.LIBRARY.impl("attend_pages", _attend_pages, "CPU")
native.LIBRARY.define(
    "attend_exact(Tensor query, Tensor keys, Tensor values, Tensor? mask, float softmax_scale, float softcap) "
    "-> (Tensor, Tensor)"
)
native.LIBRARY.impl("attend_exact", _attend_exact, "CPU")


@torch.library.register_fake("kvfold::attend_codes")
def _(query: Tensor, *given: object) -> tuple[Tensor, Tensor]:
    channels = given[10]
    assert isinstance(channels, Tensor)
    return _results(query, channels.numel(), query.float().new_empty)


@torch.library.register_fake("kvfold::attend_pages")
def _(query: Tensor, *given: object) -> Tensor:
    channels = given[12]
    assert isinstance(channels, Tensor)
    return query.float().new_empty((*query.shape[:2], channels.numel()))


@torch.library.register_fake("kvfold::attend_exact")
def _(query: Tensor, keys: Tensor, values: Tensor, *given: object) -> tuple[Tensor, Tensor]:
    return _results(query, values.shape[-1], query.float().new_empty)
