"""What a codec stores for a run of tokens: named tensors that share batch, KV head and token axes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
