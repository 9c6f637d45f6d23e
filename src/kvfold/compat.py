"""The only file that imports transformers' cache classes; what differs between 5.16 and 5.24 stays here.

5.24 renamed the model's argument `past_key_values` to `cache` and calls `update(k, v, layer, kwargs=...)`; 5.16 calls
`update(k, v, layer)`. Layers here take `update(k, v, *args, **kwargs)`, and the argument's name is read off the model.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

CACHE_NAMES = ("cache", "past_key_values", "layer_past")


def dense_layers(config: Any) -> list[Any]:
    """The cache layers transformers itself would make for `config`."""
    return DynamicCache(config=config.get_text_config(decoder=True)).layers


def layer_kind(layer: Any) -> str:
    """ "full", "sliding", or the class name of a layer kvfold does not know."""
    if type(layer) is DynamicLayer:
        return "full"
    return "sliding" if type(layer) is DynamicSlidingWindowLayer else type(layer).__name__


def is_plain_cache(cache: Any) -> bool:
    """Whether `cache` is the one that `generate` makes when it is asked for nothing special."""
    return type(cache) is DynamicCache and not getattr(cache, "offloading", False)


def cache_argument(module: torch.nn.Module) -> str | None:
    """What the module's forward calls its cache."""
    names = inspect.signature(module.forward).parameters
    return next((name for name in CACHE_NAMES if name in names), None)


def output_cache(output: Any) -> Any:
    """The cache a model's output carries."""
    return next((output[name] for name in CACHE_NAMES if name in output), None)


__all__ = [
    "CACHE_NAMES",
    "Cache",
    "CacheLayerMixin",
    "DynamicCache",
    "DynamicSlidingWindowLayer",
    "cache_argument",
    "dense_layers",
    "is_plain_cache",
    "layer_kind",
    "output_cache",
]
