"""What a codec stores for a run of tokens: named tensors that share batch, KV head and token axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TOKEN_AXIS = 2


@dataclass(frozen=True)
class Codes:
    """Packed codes of `T` tokens.

    Attributes:
        fields: name -> tensor `[B, G, T, ...]`. The name says which share of the memory a field is: "codes", "scale",
            "exact" (uncompressed elements), and what further methods need.
    """

    fields: dict[str, Tensor]

    @property
    def tokens(self) -> int:
        return next(iter(self.fields.values())).shape[TOKEN_AXIS]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.fields.values())

    def map(self, function: Callable[[Tensor], Tensor]) -> Codes:
        return Codes({name: function(tensor) for name, tensor in self.fields.items()})

    def slice(self, start: int, stop: int) -> Codes:
        """Tokens `start..stop-1`, without copying."""
        return self.map(lambda t: t[:, :, start:stop])


def stripe(common: Tensor, block: int) -> Tensor:
    """What blocks of tokens have in common, cut into a piece a token, so that it is stored like everything else.

    Args:
        common: `[B, G, N, ...]`, a row a block, any dtype.
        block: tokens a block.

    Returns:
        uint8 `[B, G, N * block, n]`; `n` bytes a token, so that the last may be padded.
    """
    rows = common.contiguous().flatten(3).view(torch.uint8)
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % block))
    return rows.unflatten(-1, (block, -1)).flatten(2, 3)


def unstripe(striped: Tensor, block: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `stripe`: `[B, G, N, *shape]` of `dtype`."""
    size = math.prod(shape) * dtype.itemsize
    rows = striped.unflatten(2, (-1, block)).flatten(3)[..., :size]
    return rows.flatten().view(dtype).view(*rows.shape[:3], *shape)
