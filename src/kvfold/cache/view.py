"""What a coded layer hands to the attention function in place of dense keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from kvfold import ops
from kvfold.codecs import Codec
from kvfold.codecs.base import Reader
from kvfold.codes import Codes


@dataclass(frozen=True)
class CodedPiece:
    """Coded slots `start..stop-1`, the codecs that read them, and how their keys are rotated.

    They are all rotated alike; `rotation` is None if they are stored rotated, or the model has no RoPE.
    """

    start: int
    stop: int
    key_codec: Codec
    value_codec: Codec
    keys: Codes
    values: Codes
    rotation: ops.Rotation | None

    @cached_property
    def reader(self) -> Reader:
        return Reader((self.key_codec, self.keys), (self.value_codec, self.values), self.rotation)


@dataclass(frozen=True)
class CacheView:
    """One layer's keys and values as seen by one forward pass.

    Attributes:
        pieces: the coded past, in order; empty if nothing is coded yet.
        keys, values: exact tokens `[B, G, E, D]`: the sinks, then slots `exact_start..length-1`.
        sinks: how many of the exact tokens are sinks (slots `0..sinks-1`).
        exact_start: slot of the first exact token behind the sinks.
        length: slots in all, those of this pass included.
        boundaries: int64 `[Q]` or None. Query `i` reads slots below `boundaries[i]` as codes and the others exactly;
            None: every query reads every exact token exactly and codes for the rest.
    """

    pieces: list[CodedPiece]
    keys: Tensor
    values: Tensor
    sinks: int
    exact_start: int
    length: int
    boundaries: Tensor | None
