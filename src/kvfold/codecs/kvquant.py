"""KVQuant: levels learned from what the loss feels, a few outliers kept aside (Hooper et al., arXiv 2401.18079, section 3).

Keys are taken before RoPE, where a channel keeps its size from token to token: a channel's middle `m` and half-range `s` are
learned from samples, between the quantiles that leave out its outliers. Of a value vector, `m` and `s` are its own, stored in
float16. In either case

    u = (x - m) / s,   j = argmin_j |u - c_j|,   x ~ m + s c_j

with one table of `2^bits` levels `c` a layer and side, which minimises `sum of F s^2 (u - c_j)^2` over samples (k-means in one
dimension, "nuq"); `F` is the second moment of the loss's gradient, the Fisher information's diagonal. About 1% of a vector's
elements, those furthest out, are stored beside the codes: a float16 each and its place. At 2 bits, levels are read shifted and
stretched so that mean and standard deviation of what was coded are kept ("Q-Norm").

Stored: `bits` an element, packed, and for every one of `n` outliers 16 bits and 8 of place; values have 32 of scale:

    bits per element = bits + (24 n + 32 [values]) / D.

The paper's exact first token is the cache's `sinks`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from kvfold.codecs.base import NO_FACTS, Codec, Facts
from kvfold.codecs.levels import nearest_level, weighted_levels
from kvfold.codes import Codes
from kvfold.errors import InputError
from kvfold.packing import pack, packed_bytes, unpack

_REACH = torch.finfo(torch.float16).max
_ELEMENTS = 1 << 22  # that levels are learned from


class KVQuantCodec(Codec):
    """`bits` of 1 to 8 an element; `side` "key" (statistics of channels) or "value" (of the token).

    Args:
        outliers: share of a vector's elements kept in float16, at least one of them unless it is 0.
        qnorm: levels of this many bits or fewer are read with mean and standard deviation kept.
        tensors: what `tensors()` gave, None before `fit`.
    """

    kind = "kvquant"
    wants = frozenset({"sensitivity"})

    def __init__(
        self,
        head_dim: int,
        side: str,
        bits: int = 3,
        outliers: float = 0.01,
        qnorm: int = 2,
        tensors: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__(head_dim)
        if not 1 <= bits <= 8:
            raise InputError("bits from 1 to 8", str(bits), "choose one in that range")
        if not 0 <= outliers <= 0.5:
            raise InputError("outliers from 0 to 0.5 of a vector", f"{outliers:g}", "choose a share in that range")
        if side not in ("key", "value"):
            raise InputError("side among key, value", repr(side), "choose one of these")
        self.side, self.bits, self.outliers, self.qnorm = side, bits, outliers, qnorm
        self.pre_rope = side == "key"
        self.exact = max(1, round(outliers * head_dim)) if outliers else 0
        self._places = torch.uint8 if head_dim <= 256 else torch.int16
        self._tensors = tensors or {}

    def _encode(self, x: Tensor) -> Codes:
        places = self._furthest(x)
        middle, reach = self._frame(x, places)
        codes = pack(nearest_level(_within(x, middle, reach), self._tensors["levels"]), self.bits)
        fields = {"codes": codes}
        if self.side == "value":
            fields["scale"] = torch.cat((middle, reach), -1).half()
        if self.exact:
            fields["exact"] = x.gather(-1, places).clamp(-_REACH, _REACH).half()
            fields["places"] = places.to(self._places)
        return Codes(fields)

    def decode(self, codes: Codes) -> Tensor:
        fields = codes.fields
        levels = self._tensors["read" if "read" in self._tensors else "levels"]
        x = levels[unpack(fields["codes"], self.bits, self.head_dim).long()]
        middle, reach = fields["scale"].float().split(1, -1) if self.side == "value" else self._channels()
        x = x * reach + middle
        return x.scatter(-1, fields["places"].long(), fields["exact"].float()) if self.exact else x

    def _channels(self) -> tuple[Tensor, Tensor]:
        """Middle and half-range of channels, `[G, 1, D]`."""
        return self._tensors["middle"][:, None], self._tensors["reach"][:, None]

    def _furthest(self, x: Tensor) -> Tensor:
        """Places int64 `[..., n]` of the outliers of `x [..., D]`.

        Of keys, those furthest outside of their channel's range; of values, those whose absence leaves the narrowest range.
        """
        if self.side == "key":
            return _within(x, *self._channels()).abs().argsort(dim=-1, descending=True, stable=True)[..., : self.exact]
        ordered, order = x.sort(dim=-1, stable=True)
        kept = self.head_dim - self.exact
        ranges = ordered[..., kept - 1 :] - ordered[..., : self.exact + 1]  # with 0, 1, ... taken from the low end
        low = ranges.argmin(-1, keepdim=True)
        turn = torch.arange(self.exact, device=x.device)
        return order.gather(-1, torch.where(turn < low, turn, kept + turn))

    def _frame(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Middle and half-range that `x` without its outliers is coded in."""
        if self.side == "key":
            return self._channels()
        low = x.scatter(-1, places, torch.inf).amin(-1, keepdim=True).clamp(-_REACH, _REACH)
        high = x.scatter(-1, places, -torch.inf).amax(-1, keepdim=True).clamp(-_REACH, _REACH)
        return ((low + high) / 2).half().float(), ((high - low) / 2).half().float()

    @property
    def bits_per_element(self) -> float:
        side = self.exact * (2 + self._places.itemsize) + (4 if self.side == "value" else 0)
        return 8 * (packed_bytes(self.head_dim, self.bits) + side) / self.head_dim

    def fit(
        self, x: Tensor, generator: torch.Generator, progress: Callable[[], None] = lambda: None, facts: Facts = NO_FACTS
    ) -> None:
        if x.shape[1] < 2:
            raise InputError("at least 2 sample tokens", str(x.shape[1]), "give more text")
        x = x.float()
        self._tensors = self._ranges(x) if self.side == "key" else {}
        x = x[:, :: -(-x.numel() // _ELEMENTS)]
        places = self._furthest(x)
        middle, reach = self._frame(x, places)
        u = _within(x, middle, reach)
        felt = torch.ones(len(x), self.head_dim) if facts.sensitivity is None else facts.sensitivity.diagonal(dim1=1, dim2=2)
        weight = (felt.to(x.device)[:, None] * reach.square()).expand_as(x).scatter(-1, places, 0.0)
        levels = weighted_levels(u.flatten(), weight.flatten(), self.bits)
        self._tensors["levels"] = levels
        if self.bits <= self.qnorm:
            coded = torch.ones_like(x, dtype=torch.bool).scatter(-1, places, False)
            self._tensors["read"] = normed(levels, u[coded])
        progress()

    def _ranges(self, x: Tensor) -> dict[str, Tensor]:
        """Middle and half-range `[G, D]` of channels, as many outliers left out at either end."""
        ordered = x.sort(1).values
        out = int(self.exact / self.head_dim / 2 * (x.shape[1] - 1))
        low, high = ordered[:, out], ordered[:, -1 - out]
        return {"middle": ((low + high) / 2).contiguous(), "reach": ((high - low) / 2).contiguous()}

    def settings(self) -> dict[str, Any]:
        return {"side": self.side, "bits": self.bits, "outliers": self.outliers, "qnorm": self.qnorm}

    def tensors(self) -> dict[str, Tensor]:
        return self._tensors

    @classmethod
    def restore(cls, head_dim: int, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        return cls(head_dim, **settings, tensors=tensors)


def normed(levels: Tensor, x: Tensor) -> Tensor:
    """`levels [n]` shifted and stretched: samples `x [N]` read by them keep their mean and standard deviation (Q-Norm)."""
    read = levels[nearest_level(x, levels)].double()
    stretch = x.double().std(correction=0) / read.std(correction=0)
    return ((levels - read.mean()) * stretch.nan_to_num(1.0, 1.0, 1.0) + x.double().mean()).float()


def _within(x: Tensor, middle: Tensor, reach: Tensor) -> Tensor:
    return (x - middle) / torch.where(reach > 0, reach, 1.0)
