"""Residual nearest-codeword search in C++ (csrc/encode.cpp): the codes of `naive.encode`.

Sums are rounded in another order than there, so two codewords whose distances differ by less than float32 resolves may be
taken one for the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.ops import native
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
    array, results = native.array, _stored_like(x, codebooks, book, channels, weights, bits, beam, scale_bits)
    packed, scale = results
    x = x.float()
    native.module().code(
        array(x if x.stride(-1) == 1 else x.contiguous()),
        native.books(codebooks, book),
        array(channels),
        None if weights is None else array(weights.float().contiguous()),
        bits,
        beam,
        torch.get_num_threads(),
        array(packed),
        array(scale if scale_bits == 8 else scale.view(torch.uint16)),
    )
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


native.LIBRARY.define("encode(Tensor vectors, Tensor codebooks, Tensor book, int beam) -> Tensor")
native.LIBRARY.impl("encode", _encode, "CPU")
torch.library.register_fake("kvfold::encode", _like)
native.LIBRARY.define(
    "code(Tensor x, Tensor codebooks, Tensor book, Tensor channels, Tensor? weights, int bits, int beam, int scale_bits) "
    "-> (Tensor, Tensor)"
)
native.LIBRARY.impl("code", _code, "CPU")
torch.library.register_fake("kvfold::code", _stored_like)
