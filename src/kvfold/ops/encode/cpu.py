"""Residual nearest-codeword search in C++ (csrc/encode.cpp): the codes of `naive.encode`.

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


def _encode(vectors: Tensor, codebooks: Tensor, book: Tensor, beam: int) -> Tensor:
    codes = _like(vectors, codebooks, book, beam)
    ready = native.books(codebooks, book)
    given = native.array(vectors.float().contiguous())
    native.module().encode(given, ready, beam, torch.get_num_threads(), native.array(codes))
    return codes


def _like(vectors: Tensor, codebooks: Tensor, book: Tensor, beam: int) -> Tensor:
    batch, heads, tokens, groups, _ = vectors.shape
    return vectors.new_empty((batch, heads, tokens, book.shape[0], groups), dtype=torch.int32)


native.LIBRARY.define("encode(Tensor vectors, Tensor codebooks, Tensor book, int beam) -> Tensor")
native.LIBRARY.impl("encode", _encode, "CPU")
torch.library.register_fake("kvfold::encode", _like)
