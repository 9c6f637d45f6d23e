"""Collecting keys and values through the seam the cache uses: a cache that samples what it is given and returns it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kvfold import ops
from kvfold.config import ModelSpec
from kvfold.errors import non_finite
from kvfold.integration.attach import hooked
from kvfold.integration.models import input_device
from kvfold.integration.stand_in import StandInCache, StandInLayer


class CaptureLayer(StandInLayer):
    """Takes chosen tokens of one layer, keys un-rotated if asked, and hands everything on unchanged."""

    def __init__(self, cache: CaptureCache, layer: int, pre_rope: bool) -> None:
        super().__init__(cache, cache.spec.rope(layer) if pre_rope else None)
        self._capture, self._layer = cache, layer
        self.sampled_keys: list[Tensor] = []
        self.sampled_values: list[Tensor] = []
        self.rotations: list[ops.Rotation] = []  # of the sampled keys, a pass each

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keep = self._capture.keep.to(key_states.device)  # a large model's layers may be spread over devices
        keys, values = key_states[0, :, keep], value_states[0, :, keep]  # [G, n, D]
        if not bool(torch.isfinite(keys).all() & torch.isfinite(values).all()):
            raise non_finite()
        rotation = self.rotation(keep, keys.device)
        if rotation is not None:
            keys = ops.unrotate(keys[None], *rotation)[0]
        keys, values = keys.detach().float(), values.detach().float()
        if self._capture.take is not None:
            self._capture.take(self._layer, keys, values)
        else:
            self.sampled_keys.append(keys.cpu())
            self.sampled_values.append(values.cpu())
            if rotation is not None:
                self.rotations.append(rotation._replace(positions=rotation.positions.cpu(), inv_freq=rotation.inv_freq.cpu()))
        return key_states, value_states


class CaptureCache(StandInCache):
    """Stands in for the cache during calibration: batch 1, every pass starts a new sequence.

    Args:
        spec: the model's shape.
        pre_rope: keys are taken before RoPE.
        take: called as `take(layer, keys, values)` with the chosen tokens of a layer, `[G, n, D]` float32, as they pass;
            without it they are kept for `samples`.
    """

    def __init__(self, spec: ModelSpec, pre_rope: bool, take: Callable[[int, Tensor, Tensor], None] | None = None) -> None:
        self.spec, self.take = spec, take
        self.keep = torch.empty(0, dtype=torch.int64)
        super().__init__(layers=[CaptureLayer(self, i, pre_rope) for i in range(len(spec.layers))])

    def choose(self, keep: Tensor) -> None:
        """Token indices of the next pass to keep."""
        self.keep = keep

    def samples(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[G, N, D]` float32 of `layer`."""
        chosen: Any = self.layers[layer]
        return torch.cat(chosen.sampled_keys, 1), torch.cat(chosen.sampled_values, 1)

    def place(self, layer: int, keys: Tensor) -> Tensor:
        """Keys before RoPE `[G, N, D]` of the sampled tokens of `layer`, rotated to their positions."""
        chosen: Any = self.layers[layer]
        rotations = chosen.rotations
        if not rotations:  # this layer has no RoPE
            return keys
        parts = keys.split([rotation.positions.shape[1] for rotation in rotations], 1)
        return torch.cat([ops.rotate(part[None], *own)[0] for part, own in zip(parts, rotations, strict=True)], 1)


@contextmanager
def capturing(model: Any, cache: CaptureCache) -> Iterator[Callable[[Tensor], None]]:
    """Yields a function that runs token ids `[T]` through `model` with `cache`: eval mode, no gradients, undone after it."""
    device = input_device(model)
    training = model.training
    model.eval()

    def read(ids: Tensor) -> None:
        model(input_ids=ids[None].to(device), use_cache=True, logits_to_keep=1)

    try:
        with torch.no_grad(), hooked(model, lambda: cache):
            yield read
    finally:
        model.train(training)
