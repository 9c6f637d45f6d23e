"""Codes back to vectors in C++ (csrc/decode.cpp): the vectors of `naive.decode`, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.ops import native


def decode(codes: Tensor, codebooks: Tensor, book: Tensor) -> Tensor:
    """As `naive.decode`; ValueError for a code that names no codeword."""
    return torch.ops.kvfold.decode(codes, codebooks, book)


def _decode(codes: Tensor, codebooks: Tensor, book: Tensor) -> Tensor:
    vectors = _like(codes, codebooks, book)
    ready = native.books(codebooks, book)
    native.module().decode(
        native.array(codes.to(torch.int32).contiguous()), ready, torch.get_num_threads(), native.array(vectors)
    )
    return vectors


def _like(codes: Tensor, codebooks: Tensor, book: Tensor) -> Tensor:
    batch, heads, tokens, _, groups = codes.shape
    return codes.new_empty((batch, heads, tokens, groups, codebooks.shape[2]), dtype=torch.float32)


native.LIBRARY.define("decode(Tensor codes, Tensor codebooks, Tensor book) -> Tensor")
native.LIBRARY.impl("decode", _decode, "CPU")
torch.library.register_fake("kvfold::decode", _like)
