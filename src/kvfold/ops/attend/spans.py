"""Which keys each query sees: a mask, a byte a query and key, or, where they are a few runs of keys, the ends of those."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Spans(NamedTuple):
    """Query `q` sees keys `bounds[q, i, 0] .. bounds[q, i, 1] - 1` of every `i`. Spans may be empty, or end behind the keys.

    bounds int32 `[Q, n, 2]`, for all batch rows.
    """

    bounds: Tensor

    @classmethod
    def of(cls, *ends: Tensor) -> Spans:
        """From integers `[Q]`: the first key of each span and the one behind its last, span after span."""
        return cls(torch.stack(ends, 1).int().unflatten(1, (-1, 2)))

    def mask(self, start: int, stop: int) -> Tensor:
        """The same of keys `start..stop-1`, bool `[1, 1, Q, stop - start]`."""
        key = torch.arange(start, stop, device=self.bounds.device)
        first, last = self.bounds[..., None].unbind(2)
        return ((key >= first) & (key < last)).any(1)[None, None]


Mask = Tensor | Spans  # a tensor is bool `[B or 1, 1, Q, T]`, True where a query may look


def mask_of(seen: Mask | None, start: int, stop: int) -> Tensor | None:
    """What is seen of keys `start..stop-1` as a mask; None if every query sees them all."""
    if isinstance(seen, Spans):
        return seen.mask(start, stop)
    return None if seen is None else seen[..., start:stop]
