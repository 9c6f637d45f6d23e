"""Residual nearest-codeword search in C++ (csrc/encode.cpp, and scale.cpp before it): the codes of `naive.encode`.

Sums are rounded in another order than there, so two codewords whose distances differ by less than float32 resolves may be
taken one for the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.ops import native


def encode(vectors: Tensor, codebooks: Tensor, book: Tensor, beam: int = 1) -> Tensor:
    """As `naive.encode`."""
    return torch.ops.kvfold.encode(vectors, codebooks, book, beam)


def scaled_groups(x: Tensor, channels: Tensor, weights: Tensor | None, scale_bits: int) -> tuple[Tensor, Tensor]:
    """As `naive.scaled_groups`."""
    return torch.ops.kvfold.scaled_groups(x, channels, weights, scale_bits)


def _encode(vectors: Tensor, codebooks: Tensor, book: Tensor, beam: int) -> Tensor:
    codes = _like(vectors, codebooks, book, beam)
    ready = native.books(codebooks, book)
    given = native.array(vectors.float().contiguous())
    native.module().encode(given, ready, beam, torch.get_num_threads(), native.array(codes))
    return codes


def _like(vectors: Tensor, codebooks: Tensor, book: Tensor, beam: int) -> Tensor:
    batch, heads, tokens, groups, _ = vectors.shape
    return vectors.new_empty((batch, heads, tokens, book.shape[0], groups), dtype=torch.int32)


def _scaled_groups(x: Tensor, channels: Tensor, weights: Tensor | None, scale_bits: int) -> tuple[Tensor, Tensor]:
    vectors, scale = _groups_like(x, channels, weights, scale_bits)
    x = x.float()
    native.module().scaled_groups(
        native.array(x if x.stride(-1) == 1 else x.contiguous()),
        native.array(channels.contiguous()),
        None if weights is None else native.array(weights.float().contiguous()),
        torch.get_num_threads(),
        native.array(vectors),
        native.array(scale if scale_bits == 8 else scale.view(torch.uint16)),
    )
    return vectors, scale


def _groups_like(x: Tensor, channels: Tensor, weights: Tensor | None, scale_bits: int) -> tuple[Tensor, Tensor]:
    vectors = x.new_empty((*x.shape[:3], *channels.shape), dtype=torch.float32)
    return vectors, x.new_empty((*x.shape[:3], 1), dtype=torch.uint8 if scale_bits == 8 else torch.float16)


native.LIBRARY.define("encode(Tensor vectors, Tensor codebooks, Tensor book, int beam) -> Tensor")
native.LIBRARY.impl("encode", _encode, "CPU")
torch.library.register_fake("kvfold::encode", _like)
native.LIBRARY.define("scaled_groups(Tensor x, Tensor channels, Tensor? weights, int scale_bits) -> (Tensor, Tensor)")
native.LIBRARY.impl("scaled_groups", _scaled_groups, "CPU")
torch.library.register_fake("kvfold::scaled_groups", _groups_like)
