"""TurboQuant: rotate, then quantize every coordinate by one table (Zandieh et al., arXiv 2504.19874, algorithm 1).

    n = ||x||,   y = R x / n * sqrt(D),   j_i = argmin_j |y_i - c_j|,   x ~ n / sqrt(D) * R' c[j]

`R` is a fixed random rotation (signs, then a Hadamard matrix; for a `D` that is no power of two, the Q of a random matrix), the
same for all layers and heads. After it the coordinates of any vector look like draws from a normal distribution, so one table
of `2^bits` levels, Lloyd and Max's for the normal distribution, serves all, and nothing is calibrated. Stored: `bits` a
coordinate, packed, and a float16 norm:

    bits per element = bits + 16 / D.

With `outliers` (section 4.3) two independent instances share the channels: the `outliers` channels of a head with the largest
mean square in the calibration samples are quantized by `outlier_bits`, the others by `bits`, each part with its own norm and
rotation. The channel numbers are the codec's only tensor:

    bits per element = (outliers * outlier_bits + (D - outliers) * bits + 32) / D.

Keys are coded after RoPE. The paper's variant for unbiased inner products is `turboquant-prod`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from kvfold.codecs.base import NO_FACTS, Codec, Facts
from kvfold.codecs.levels import normal_levels
from kvfold.codecs.qjl import norms
from kvfold.codecs.transform import rotation
from kvfold.codes import Codes
from kvfold.errors import InputError
from kvfold.packing import pack, packed_bytes, unpack


class TurboQuantCodec(Codec):
    """`bits` of 1 to 8 a coordinate, `outlier_bits` in the `outliers` channels that `channels [G, outliers]` lists by head."""

    kind = "turboquant"

    def __init__(
        self, head_dim: int, bits: int = 2, outliers: int = 0, outlier_bits: int = 3, channels: Tensor | None = None
    ) -> None:
        super().__init__(head_dim)
        for name, number in (("bits", bits), ("outlier_bits", outlier_bits)):
            if not 1 <= number <= 8:
                raise InputError(f"{name} from 1 to 8", str(number), "choose one in that range")
        if not 0 <= outliers < head_dim:
            raise InputError(f"outliers from 0 to {head_dim - 1}", str(outliers), "choose a number in that range")
        self.bits, self.outliers, self.outlier_bits = bits, outliers, outlier_bits
        self._parts = [(head_dim - outliers, bits), *([(outliers, outlier_bits)] if outliers else [])]  # channels, bits
        self._channels = channels

    def _encode(self, x: Tensor) -> Codes:
        if self.outliers:
            x = x.gather(-1, self._order.to(x.device)[:, None].expand_as(x))
        packed, scales = [], []
        for part, (dim, bits) in zip(x.split([dim for dim, _ in self._parts], -1), self._parts, strict=True):
            scale = norms(part)
            whole = scale.float()
            unit = part / torch.where(whole > 0, whole, 1.0) * math.sqrt(dim)
            middles = (levels := normal_levels(bits).to(x.device))[1:] + levels[:-1]
            codes = torch.bucketize((unit @ rotation(dim).to(x.device).T).contiguous(), middles / 2)
            packed.append(pack(codes, bits))
            scales.append(scale)
        return Codes({"codes": torch.cat(packed, -1), "scale": torch.cat(scales, -1)})

    def latent(self, codes: Codes) -> Tensor:
        packed = codes.fields["codes"].split([packed_bytes(dim, bits) for dim, bits in self._parts], -1)
        scales = codes.fields["scale"].float().split(1, -1)
        return torch.cat(
            [
                normal_levels(bits).to(part.device)[unpack(part, bits, dim).long()] * (scale / math.sqrt(dim))
                for part, scale, (dim, bits) in zip(packed, scales, self._parts, strict=True)
            ],
            -1,
        )

    @property
    def basis(self) -> Tensor:
        blocks = torch.block_diag(*(rotation(dim) for dim, _ in self._parts))
        return blocks[:, self._order.argsort(-1).cpu()].transpose(0, 1) if self.outliers else blocks

    @property
    def _order(self) -> Tensor:
        """Channels of each head, the outliers last, int64 `[G, D]`."""
        if self._channels is None:
            raise InputError("a calibrated codec", "one that was not fitted", "calibrate it, or set outliers=0")
        chosen = self._channels.long()
        last = torch.zeros(len(chosen), self.head_dim, dtype=torch.int64, device=chosen.device).scatter(1, chosen, 1)
        return last.argsort(dim=-1, stable=True)

    @property
    def bits_per_element(self) -> float:
        return sum(8 * packed_bytes(dim, bits) + 16 for dim, bits in self._parts) / self.head_dim

    def fit(
        self,
        x: Tensor,
        generator: torch.Generator,
        progress: Callable[[], None] = lambda: None,
        facts: Facts = NO_FACTS,
    ) -> None:
        if self.outliers:
            largest = x.float().square().mean(1).argsort(dim=-1, descending=True, stable=True)
            self._channels = largest[:, : self.outliers].sort(-1).values.to(torch.int16)
        progress()

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "outliers": self.outliers, "outlier_bits": self.outlier_bits}

    def tensors(self) -> dict[str, Tensor]:
        return {} if self._channels is None else {"channels": self._channels}

    @classmethod
    def restore(cls, head_dim: int, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        return cls(head_dim, **settings, channels=tensors.get("channels"))
