"""Plain tensors in, plain tensors out: residual search, decoding, attention on codes. Knows no codec, cache or model."""

from __future__ import annotations

from torch import Tensor

from kvfold.ops.attend.naive import Coded, Rotation, attend_tiles, decode_tile, rotated_center
from kvfold.ops.dispatch import available_backends, select
from kvfold.ops.merge import merge
from kvfold.ops.rope import rotate, unrotate


def encode(vectors: Tensor, codebooks: Tensor, book: Tensor, beam: int = 1, backend: str | None = None) -> Tensor:
    """Residual nearest-codeword search; see `ops/encode/naive.py` for shapes and the rule for ties."""
    return select("encode", backend, vectors.device.type)(vectors, codebooks, book, beam)


def scaled_groups(
    x: Tensor, channels: Tensor, weights: Tensor | None, scale_bits: int, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """What the search sees of vectors, and their scales; see `ops/encode/naive.py`."""
    return select("scaled_groups", backend, x.device.type)(x, channels, weights, scale_bits)


def decode(codes: Tensor, codebooks: Tensor, book: Tensor, backend: str | None = None) -> Tensor:
    """Codes to vectors; see `ops/decode/naive.py`."""
    return select("decode", backend, codes.device.type)(codes, codebooks, book)


def attend(
    query: Tensor,
    key: Coded,
    value: Coded,
    rotation: Rotation | None,
    mask: Tensor | None,
    softmax_scale: float,
    softcap: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention on residual codes, `(out, lse)`; see `ops/attend/naive.py`."""
    run = select("attend", backend, query.device.type)
    return run(query, key, value, rotation, mask, softmax_scale, softcap)


def attend_exact(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    softmax_scale: float,
    softcap: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention on exact keys and values, `(out, lse)`; see `ops/attend/naive.py`."""
    run = select("attend_exact", backend, query.device.type)
    return run(query, keys, values, mask, softmax_scale, softcap)


__all__ = [
    "Coded",
    "Rotation",
    "attend",
    "attend_exact",
    "attend_tiles",
    "available_backends",
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
