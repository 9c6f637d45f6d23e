"""Collecting keys and values through the seam the cache uses: a cache that samples what it is given and returns it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvfold import ops
from kvfold.codecs.base import non_finite
from kvfold.compat import Cache, CacheLayerMixin
from kvfold.config import ModelSpec


class CaptureLayer(CacheLayerMixin):
    """Keeps chosen tokens of one layer, keys un-rotated if asked, and hands everything on unchanged."""

    is_sliding = False

    def __init__(self, cache: CaptureCache, layer: int, pre_rope: bool) -> None:
        super().__init__()
        rope = cache.spec.rope(layer) if pre_rope else None
        self._cache, self._rope = cache, rope
        self._inv_freq = [torch.tensor(row) for row in rope.inv_freq] if rope else []
        self.sampled_keys: list[Tensor] = []
        self.sampled_values: list[Tensor] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keep = self._cache.keep
        keys, values = key_states[0, :, keep], value_states[0, :, keep]  # [G, n, D]
        if not bool(torch.isfinite(keys).all() & torch.isfinite(values).all()):
            raise non_finite()
        if self._rope is not None:
            positions = self._cache.current[:, keep]
            switch = self._rope.switch_length
            regime = int(switch is not None and int(self._cache.current.max()) + 1 > switch)
            inv_freq = self._inv_freq[regime].to(keys.device)
            keys = ops.unrotate(keys[None], positions, inv_freq, self._rope.factor, self._rope.interleaved)[0]
        self.sampled_keys.append(keys.detach().float().cpu())
        self.sampled_values.append(values.detach().float().cpu())
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


class CaptureCache(Cache):
    """Stands in for the cache during calibration: batch 1, every pass starts a new sequence.

    Args:
        spec: the model's shape.
        pre_rope: keys are sampled before RoPE.
    """

    layers: list[Any]

    def __init__(self, spec: ModelSpec, pre_rope: bool) -> None:
        self.spec = spec
        self.keep = torch.empty(0, dtype=torch.int64)
        self.current = torch.empty(1, 0, dtype=torch.int64)
        super().__init__(layers=[CaptureLayer(self, i, pre_rope) for i in range(len(spec.layers))])

    def choose(self, keep: Tensor) -> None:
        """Token indices of the next pass to keep."""
        self.keep = keep

    def begin(self, positions: Tensor, batch: int) -> None:
        self.current = positions

    def end(self, failed: bool) -> None: ...

    def samples(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[G, N, D]` float32 of `layer`; they are let go of, to save memory."""
        chosen = self.layers[layer]
        keys, values = torch.cat(chosen.sampled_keys, 1), torch.cat(chosen.sampled_values, 1)
        chosen.sampled_keys, chosen.sampled_values = [], []
        return keys, values
