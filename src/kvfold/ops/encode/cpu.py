"""Residual nearest-codeword search in C++ (csrc/encode.cpp): the codes of `naive.encode`.

Sums are rounded in another order than there, so two codewords whose distances differ by less than float32 resolves may be
taken one for the other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvfold.errors import non_finite
from kvfold.ops import native
from kvfold.ops.attend.naive import Rotation
from kvfold.ops.encode.pages import Coder, Stored
from kvfold.packing import packed_bytes


def encode(vectors: Tensor, codebooks: Tensor, book: Tensor, beam: int = 1) -> Tensor:
    """As `naive.encode`."""
    return torch.ops.kvfold.encode(vectors, codebooks, book, beam)


def code(
    x: Tensor,
    codebooks: Tensor,
    book: Tensor,
    channels: Tensor,
    weights: Tensor | None,
    bits: int,
    beam: int = 1,
    scale_bits: int = 16,
) -> tuple[Tensor, Tensor]:
    """As `code.code` (csrc/code.cpp)."""
    run = _code if native.eager(x) else torch.ops.kvfold.code
    return run(x, codebooks, book, channels, weights, bits, beam, scale_bits)


def code_pages(
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    rotation: Rotation | None,
    coders: tuple[Coder, Coder],
    stored: tuple[Stored, Stored],
) -> None:
    """As `pages.code_pages`; ValueError for a slot that is not there."""
    positions, inv_freq, factor, interleaved = rotation or (None, None, 1.0, False)
    run: Callable[..., None] = _code_pages if native.eager(keys) else torch.ops.kvfold.code_pages
    try:
        run(slots, positions, inv_freq, factor, interleaved, keys, *coders[0], *stored[0], values, *coders[1], *stored[1])
    except ValueError as error:
        if str(error) != "NaN or Inf":
            raise
        raise non_finite() from error


def _encode(vectors: Tensor, codebooks: Tensor, book: Tensor, beam: int) -> Tensor:
    codes = _like(vectors, codebooks, book, beam)
    ready = native.books(codebooks, book)
    given = native.array(vectors.float().contiguous())
    native.module().encode(given, ready, beam, torch.get_num_threads(), native.array(codes))
    return codes


def _like(vectors: Tensor, codebooks: Tensor, book: Tensor, beam: int) -> Tensor:
    batch, heads, tokens, groups, _ = vectors.shape
    return vectors.new_empty((batch, heads, tokens, book.shape[0], groups), dtype=torch.int32)


def _code(
    x: Tensor,
    codebooks: Tensor,
    book: Tensor,
    channels: Tensor,
    weights: Tensor | None,
    bits: int,
    beam: int,
    scale_bits: int,
) -> tuple[Tensor, Tensor]:
    results = _stored_like(x, codebooks, book, channels, weights, bits, beam, scale_bits)
    searched = _searched(x, codebooks, book, channels, weights, bits, beam)
    native.module().code(*searched, torch.get_num_threads(), *map(native.array, results))
    return results


def _stored_like(
    x: Tensor,
    codebooks: Tensor,
    book: Tensor,
    channels: Tensor,
    weights: Tensor | None,
    bits: int,
    beam: int,
    scale_bits: int,
) -> tuple[Tensor, Tensor]:
    packed = x.new_empty((*x.shape[:3], packed_bytes(book.shape[0] * book.shape[2], bits)), dtype=torch.uint8)
    return packed, x.new_empty((*x.shape[:3], 1), dtype=torch.uint8 if scale_bits == 8 else torch.float16)


def _code_pages(
    slots: Tensor,
    positions: Tensor | None,
    inv_freq: Tensor | None,
    factor: float,
    interleaved: bool,
    keys: Tensor,
    key_codebooks: Tensor,
    key_book: Tensor,
    key_channels: Tensor,
    key_weights: Tensor | None,
    key_bits: int,
    key_beam: int,
    key_scale_bits: int,
    key_packed: Tensor,
    key_scale: Tensor,
    values: Tensor,
    value_codebooks: Tensor,
    value_book: Tensor,
    value_channels: Tensor,
    value_weights: Tensor | None,
    value_bits: int,
    value_beam: int,
    value_scale_bits: int,
    value_packed: Tensor,
    value_scale: Tensor,
) -> None:
    array, dense = native.array, native.dense
    key_coder = (key_codebooks, key_book, key_channels, key_weights, key_bits, key_beam)
    value_coder = (value_codebooks, value_book, value_channels, value_weights, value_bits, value_beam)
    native.module().code_pages(
        dense(slots, torch.int64),
        None if positions is None else dense(positions, torch.int32),
        None if inv_freq is None else dense(inv_freq, torch.float32),
        factor,
        interleaved,
        torch.get_num_threads(),
        *_searched(keys.transpose(0, 1)[None], *key_coder),
        array(key_packed),
        array(key_scale),
        *_searched(values.transpose(0, 1)[None], *value_coder),
        array(value_packed),
        array(value_scale),
    )


def _searched(
    x: Tensor, codebooks: Tensor, book: Tensor, channels: Tensor, weights: Tensor | None, bits: int, beam: int
) -> tuple:
    """What the C++ ops are told of vectors `[B, G, T, D]` and how they are searched."""
    x = x if x.dtype == torch.bfloat16 else x.float()
    given = x if x.stride(-1) == 1 else x.contiguous()
    own = None if weights is None else native.dense(weights, torch.float32)
    return native.array(given), native.books(codebooks, book), native.array(channels), own, bits, beam


native.LIBRARY.define("encode(Tensor vectors, Tensor codebooks, Tensor book, int beam) -> Tensor")
native.LIBRARY.impl("encode", _encode, "CPU")
torch.library.register_fake("kvfold::encode", _like)
native.LIBRARY.define(
    "code(Tensor x, Tensor codebooks, Tensor book, Tensor channels, Tensor? weights, int bits, int beam, int scale_bits) "
    "-> (Tensor, Tensor)"
)
native.LIBRARY.impl("code", _code, "CPU")
torch.library.register_fake("kvfold::code", _stored_like)


def _code_side(side: str, first: str, second: str) -> str:
    return (
        f"Tensor {side}s, Tensor {side}_codebooks, Tensor {side}_book, Tensor {side}_channels, Tensor? {side}_weights, "
        f"int {side}_bits, int {side}_beam, int {side}_scale_bits, "
        f"Tensor({first}!) {side}_packed, Tensor({second}!) {side}_scale"
    )


native.LIBRARY.define(
    "code_pages(Tensor slots, Tensor? positions, Tensor? inv_freq, float factor, bool interleaved, "
    f"{_code_side('key', 'a', 'b')}, {_code_side('value', 'c', 'd')}) -> ()"
)
native.LIBRARY.impl("code_pages", _code_pages, "CPU")
torch.library.register_fake("kvfold::code_pages")(lambda *given: None)
