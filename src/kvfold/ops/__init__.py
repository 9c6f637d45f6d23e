"""Plain tensors in, plain tensors out: residual search, decoding, attention on codes. Knows no codec, cache or model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from kvfold.ops.attend.naive import Coded, Exact, Past, Rotation, attend_tiles, decode_tile, rotated_center
from kvfold.ops.attend.pages import alike
from kvfold.ops.attend.spans import Mask, Spans
from kvfold.ops.dispatch import available_backends, select
from kvfold.ops.encode.code import scaled_groups
from kvfold.ops.encode.pages import Coder, Stored
from kvfold.ops.merge import merge
from kvfold.ops.rope import rotate


def _of(op: str, backend: str | None, tensor: Tensor) -> Callable:
    """The function of `op` for that tensor; `device.type` is read only if need be, which takes 10 us on cold caches."""
    return select(op, backend, "cpu" if tensor.is_cpu else tensor.device.type)


def encode(vectors: Tensor, codebooks: Tensor, book: Tensor, beam: int = 1, backend: str | None = None) -> Tensor:
    """Residual nearest-codeword search; see `ops/encode/naive.py` for shapes and the rule for ties."""
    return _of("encode", backend, vectors)(vectors, codebooks, book, beam)


def code(
    x: Tensor,
    codebooks: Tensor,
    book: Tensor,
    channels: Tensor,
    weights: Tensor | None,
    bits: int,
    beam: int = 1,
    scale_bits: int = 16,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Packed codes and scales of vectors; see `ops/encode/code.py` for shapes."""
    return _of("code", backend, x)(x, codebooks, book, channels, weights, bits, beam, scale_bits)


def code_pages(
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    rotation: Rotation | None,
    coders: tuple[Coder, Coder],
    stored: tuple[Stored, Stored],
    backend: str | None = None,
) -> None:
    """Code keys and values straight into pages; see `ops/encode/pages.py`."""
    _of("code_pages", backend, keys)(keys, values, slots, rotation, coders, stored)


def decode(codes: Tensor, codebooks: Tensor, book: Tensor, backend: str | None = None) -> Tensor:
    """Codes to vectors; see `ops/decode/naive.py`."""
    return _of("decode", backend, codes)(codes, codebooks, book)


def attend(
    query: Tensor,
    key: Coded,
    value: Coded,
    rotation: Rotation | None,
    mask: Mask | None,
    softmax_scale: float,
    softcap: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention on residual codes, `(out, lse)`; see `ops/attend/naive.py`."""
    run = _of("attend", backend, query)
    return run(query, key, value, rotation, mask, softmax_scale, softcap)


def attend_exact(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Mask | None,
    softmax_scale: float,
    softcap: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention on exact keys and values, `(out, lse)`; see `ops/attend/naive.py`."""
    run = _of("attend_exact", backend, query)
    return run(query, keys, values, mask, softmax_scale, softcap)


def attend_both(
    query: Tensor,
    past: Past,
    mask: Mask | None,
    exact: Exact | None,
    softmax_scale: float,
    softcap: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention on residual codes and on exact keys and values, `(out, lse)`; see `ops/attend/naive.py`."""
    return _of("attend_both", backend, query)(query, past, mask, exact, softmax_scale, softcap)


def attend_pages(
    query: Tensor,
    key: Coded,
    value: Coded,
    table: Tensor,
    lengths: Sequence[int],
    rotation: Rotation | None,
    softmax_scale: float,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of a decode step over codes in pages; see `ops/attend/pages.py`."""
    run = _of("attend_pages", backend, query)
    return run(query, key, value, table, lengths, rotation, softmax_scale, softcap)


def unrotate(
    x: Tensor, positions: Tensor, inv_freq: Tensor, factor: float = 1.0, interleaved: bool = False, backend: str | None = None
) -> Tensor:
    """Inverse of `rotate`; see `ops/rope.py`."""
    return _of("unrotate", backend, x)(x, positions, inv_freq, factor, interleaved)


__all__ = [
    "Coded",
    "Coder",
    "Exact",
    "Mask",
    "Past",
    "Rotation",
    "Spans",
    "Stored",
    "alike",
    "attend",
    "attend_both",
    "attend_exact",
    "attend_pages",
    "attend_tiles",
    "available_backends",
    "code",
    "code_pages",
    "decode",
    "decode_tile",
    "encode",
    "merge",
    "rotate",
    "rotated_center",
    "scaled_groups",
    "select",
    "unrotate",
]
