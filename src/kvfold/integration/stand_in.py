"""What caches have in common that stand in for the real one in a single pass: nothing is kept from pass to pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvfold import ops
from kvfold.compat import Cache, CacheLayerMixin
from kvfold.config import RopeSpec


class StandInCache(Cache):
    """Every pass starts a new sequence; `current [1 or B, Q]` are the positions of the pass that began last.

    Args:
        layers: a `StandInLayer` for every layer of the model.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.current = torch.empty(1, 0, dtype=torch.int64)
        super().__init__(layers=layers)

    def begin(self, positions: Tensor, batch: int) -> None:
        self.current = positions

    def end(self, failed: bool) -> None: ...


class StandInLayer(CacheLayerMixin):
    """A layer that holds no tokens; a subclass has `update`."""

    is_sliding = False

    def __init__(self, cache: StandInCache, rope: RopeSpec | None) -> None:
        super().__init__()
        self._cache, self._rope = cache, rope
        self._inv_freq = [torch.tensor(row) for row in rope.inv_freq] if rope else []

    def rotation(self, chosen: Tensor | slice, device: torch.device) -> ops.Rotation | None:
        """How the pass's `chosen` tokens are rotated, or None if this layer's keys are taken as they come."""
        if self._rope is None:
            return None
        switch = self._rope.switch_length
        regime = int(switch is not None and int(self._cache.current.max()) + 1 > switch)
        positions = self._cache.current.to(device)[:, chosen]
        return ops.Rotation(positions, self._inv_freq[regime].to(device), self._rope.factor, self._rope.interleaved)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1
