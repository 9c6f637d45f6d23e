"""WKVQuant's cache: learned shift and scale a channel, then min/max integers (Yue et al., arXiv 2402.12065).

Channels of keys and values differ in size and middle in the same way for all tokens, so two static vectors a head flatten them,

    y = (x - shift) / scale,    z = min(y),    t = (max(y) - z) / (2^b - 1),    q = round((y - z) / t)
    x ~ (q t + z) scale + shift

and a token's `group` channels of `y` share the two float16 `t` and `z`:  bits per element = b + 32 / group. `shift` and
`scale` start as middle and half of the channel's range in the samples, so that all channels of `y` range from -1 to 1 there,
and are then trained through the blocks that follow (`calibrate/blocks.py`).

Keys are coded before RoPE, where both vectors may be folded into the weights. The paper's past-only rule, a token's own key
and value are read exact, is the cache's `window=1`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from kvfold.codecs.base import NO_FACTS, Codec, Facts
from kvfold.codecs.kivi import dequantize, quantize
from kvfold.codes import Codes
from kvfold.errors import InputError
from kvfold.packing import pack, packed_bytes, unpack

_NARROW = 1e-3  # of the widest channel's half range: no channel's scale is smaller


class WkvQuantCodec(Codec):
    """`bits` of 1 to 8 an element, `group` channels of a token together; `shift` and `scale`, float32 `[G, D]`."""

    kind = "wkvquant"

    def __init__(self, head_dim: int, bits: int = 4, group: int = 64, pre_rope: bool = False) -> None:
        super().__init__(head_dim)
        if not 1 <= bits <= 8:
            raise InputError("bits from 1 to 8", str(bits), "choose one in that range")
        if group < 2 or head_dim % group:
            raise InputError(f"a group of at least 2 that divides the head dim {head_dim}", str(group), "choose another group")
        self.bits, self.group, self.pre_rope = bits, group, pre_rope
        self.shift = self.scale = torch.empty(0, head_dim)

    def _encode(self, x: Tensor) -> Codes:
        shift, scale = self._placed(x.device)
        codes, step = quantize(((x - shift) / scale).unflatten(3, (-1, self.group)), self.bits)
        return Codes({"codes": pack(codes.flatten(3), self.bits), "scale": step.flatten(3)})

    def decode(self, codes: Codes) -> Tensor:
        stored = codes.fields["codes"]
        shift, scale = self._placed(stored.device)
        integers = unpack(stored, self.bits, self.head_dim).unflatten(3, (-1, self.group))
        flat = dequantize(integers, codes.fields["scale"].unflatten(3, (-1, 2))).flatten(3)
        return flat * scale + shift

    def through(self, x: Tensor) -> Tensor:
        """`decode(encode(x))` for `x [B, G, T, D]` float32, with gradients towards `x`, `shift` and `scale`.

        Rounding passes gradients on as they are; minimum and maximum have gradients of their own.
        """
        shift, scale = self._placed(x.device)
        flat = ((x - shift) / scale).unflatten(3, (-1, self.group))
        read = dequantize(*quantize(flat.detach(), self.bits))
        low, high = flat.amin(-1, keepdim=True), flat.amax(-1, keepdim=True)
        step = (high - low) / ((1 << self.bits) - 1)
        place = ((flat - low) / step.clamp_min(1e-12)).detach()
        soft = flat + (place.round() - place) * step  # the rounded value, as a function that has gradients
        return (soft + (read - soft).detach()).flatten(3) * scale + shift

    def with_channels(self, shift: Tensor, scale: Tensor) -> Self:
        """The same codec with another `shift` and `scale [G, D]`, which may take gradients."""
        made = type(self)(self.head_dim, self.bits, self.group, self.pre_rope)
        made.shift, made.scale = shift, scale
        return made

    def _placed(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`shift` and `scale`, `[G, 1, D]`."""
        if not len(self.scale):
            raise InputError("a fitted codec", "one without shift and scale", "call fit, or kvfold.calibrate, first")
        return self.shift.to(device)[:, None], self.scale.to(device)[:, None]

    @property
    def bits_per_element(self) -> float:
        return 8 * (packed_bytes(self.head_dim, self.bits) + 4 * (self.head_dim // self.group)) / self.head_dim

    def fit(
        self, x: Tensor, generator: torch.Generator, progress: Callable[[], None] = lambda: None, facts: Facts = NO_FACTS
    ) -> None:
        high, low = x.amax(1), x.amin(1)
        self.shift, half = (high + low) / 2, (high - low) / 2
        widest = half.amax(-1, keepdim=True)
        self.scale = torch.where(widest > 0, torch.maximum(half, _NARROW * widest), 1.0)
        progress()

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "group": self.group, "pre_rope": self.pre_rope}

    def tensors(self) -> dict[str, Tensor]:
        return {"shift": self.shift.contiguous(), "scale": self.scale.contiguous()}

    @classmethod
    def restore(cls, head_dim: int, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        codec = cls(head_dim, **settings)
        shift, scale = tensors.get("shift", codec.shift), tensors.get("scale", codec.scale)
        if shift.shape != scale.shape or scale.ndim != 2 or scale.shape[1] != head_dim or not bool((scale > 0).all()):
            found = f"{tuple(shift.shape)} and {tuple(scale.shape)}"
            fix = "the codec file is damaged: calibrate again"
            raise InputError(f"shift and scale [G, {head_dim}], scales above 0", found, fix)
        return codec.with_channels(shift, scale)
