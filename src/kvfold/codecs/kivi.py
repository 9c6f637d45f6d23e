"""KIVI: integers between the minimum and the maximum of a group (Liu et al., arXiv 2402.02750, section 3).

Keys have channels of very different size, so a group of keys is `group` tokens of one channel; a group of values is `group`
channels of one token. With `b` bits a group is stored as

    z = min(x),   s = (max(x) - z) / (2^b - 1),   q = round((x - z) / s),   x ~ q s + z

with `s` and `z` in float16:  bits per element = b + 32 / group. Nothing is calibrated. Keys are coded after RoPE.

A block of `group` tokens of keys is coded when it is full; the newest tokens wait exact, as in KIVI (its residual). The two
float16 a channel of a block are striped over the block's tokens.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from kvfold.codecs.base import Codec
from kvfold.codes import Codes, stripe, unstripe
from kvfold.errors import InputError
from kvfold.packing import pack, packed_bytes, unpack

AXES = ("channel", "token")


class KiviCodec(Codec):
    """`bits` of 1 to 8 an element, `axis` "channel" (groups over tokens) or "token" (groups over channels)."""

    kind = "kivi"

    def __init__(self, head_dim: int, axis: str, bits: int = 2, group: int = 32) -> None:
        super().__init__(head_dim)
        if not 1 <= bits <= 8:
            raise InputError("bits from 1 to 8", str(bits), "choose one in that range")
        if group < 2 or (axis == "token" and head_dim % group):
            raise InputError(f"a group of at least 2 that divides the head dim {head_dim}", str(group), "choose another group")
        if axis not in AXES:
            raise InputError(f"axis among {', '.join(AXES)}", repr(axis), "choose one of these")
        self.axis, self.bits, self.group = axis, bits, group
        self.block = group if axis == "channel" else 1

    def _encode(self, x: Tensor) -> Codes:
        codes, scale = quantize(self._grouped(x), self.bits)
        packed = pack(self._ungrouped(codes), self.bits)
        if self.axis == "token":
            return Codes({"codes": packed, "scale": scale.flatten(3)})
        return Codes({"codes": packed, "scale": stripe(scale, self.group)})

    def decode(self, codes: Codes) -> Tensor:
        integers = self._grouped(unpack(codes.fields["codes"], self.bits, self.head_dim))
        if self.axis == "token":
            scale = codes.fields["scale"].unflatten(3, (-1, 2))
        else:
            scale = unstripe(codes.fields["scale"], self.group, torch.float16, (self.head_dim, 2))
        return self._ungrouped(dequantize(integers, scale))

    def _grouped(self, x: Tensor) -> Tensor:
        """`[B, G, T, D]` as `[B, G, T / group, D, group]` (keys) or `[B, G, T, D / group, group]` (values)."""
        if self.axis == "token":
            return x.unflatten(3, (-1, self.group))
        return x.unflatten(2, (-1, self.group)).transpose(3, 4)

    def _ungrouped(self, x: Tensor) -> Tensor:
        return x.flatten(3) if self.axis == "token" else x.transpose(3, 4).flatten(2, 3)

    @property
    def bits_per_element(self) -> float:
        rows = self.head_dim if self.axis == "channel" else self.head_dim // self.group
        side = -(-4 * rows // self.block)
        return 8 * (packed_bytes(self.head_dim, self.bits) + side) / self.head_dim

    def settings(self) -> dict[str, Any]:
        return {"axis": self.axis, "bits": self.bits, "group": self.group}

    @classmethod
    def restore(cls, head_dim: int, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        return cls(head_dim, **settings)


def quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integers int32 `[..., n]` of the groups `x [..., n]`, and float16 `[..., 2]`: step and minimum."""
    reach = torch.finfo(torch.float16).max
    low, high = x.amin(-1, keepdim=True).clamp(-reach, reach).half(), x.amax(-1, keepdim=True)
    top = (1 << bits) - 1
    step = ((high - low.float()) / top).clamp(0, reach).half()
    whole = torch.where(step > 0, step.float(), 1.0)
    codes = ((x - low.float()) / whole).round().clamp(0, top).to(torch.int32)
    return codes, torch.cat((step, low), -1)


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """Inverse of `quantize` up to half a step, float32 `[..., n]`."""
    step, low = scale.float().split(1, -1)
    return codes * step + low
