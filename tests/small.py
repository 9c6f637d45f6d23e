"""Small fitted codecs and a model spec made by hand, for tests that need no model."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvfold import ops
from kvfold.codecs import METHODS, Codec, Side, build_codec, resolve_settings
from kvfold.codecs.artifact import CodecSet
from kvfold.codecs.base import Facts
from kvfold.config import LayerSpec, ModelSpec, RopeSpec

DIM, HEADS = 16, 2
SETTINGS = {"group": 8, "codebook_size": 12, "stages": 3, "iterations": 3, "inner": 4, "block": 8}
OWN = {
    "asymkv": {"value_layers": 1},
    "turboquant": {"outliers": 4},
    "qjl": {"outliers": 4},
}  # asymkv: layer 0 at its high width
SPEC = ModelSpec(
    model_type="llama",
    heads=4,
    kv_heads=HEADS,
    head_dim=DIM,
    max_positions=512,
    layers=(LayerSpec(True, 0), LayerSpec(False, 1), LayerSpec(True, None)),
    ropes=(RopeSpec(((1.0, 0.1, 0.01), (0.5, 0.05, 0.005)), 1.2, True, 128), RopeSpec(((1.0, 0.3),))),
)


def samples(tokens: int = 304, seed: int = 0, heads: int = HEADS, dim: int = DIM) -> Tensor:
    """`[G, N, D]` with channels of different size and mean, as keys have."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(heads, tokens, dim, generator=draw) * torch.linspace(0.2, 2, dim) + torch.linspace(-1, 1, dim)


def small_settings(name: str, **changes: Any) -> dict[str, Any]:
    """Settings of a method that fit in a moment; `SETTINGS` and `changes` it does not know are left out."""
    known = METHODS[name].defaults
    return resolve_settings(name, {k: v for k, v in {**SETTINGS, **OWN.get(name, {}), **changes}.items() if k in known}, DIM)


def place(keys: Tensor) -> Tensor:
    """Keys `[G, N, D]` rotated to positions 0 .. N-1."""
    return ops.rotate(keys[None], torch.arange(keys.shape[1])[None], torch.tensor([1.0, 0.1, 0.01]), 1.1)[0]


def fit(name: str, side: Side = "key", seed: int = 0, x: Tensor | None = None, **changes: Any) -> Codec:
    codec = build_codec(name, side, DIM, small_settings(name, **changes))
    codec.fit(samples() if x is None else x, torch.Generator().manual_seed(seed), facts=Facts(place=place))
    return codec


@functools.cache
def fitted(name: str, side: Side = "key") -> Codec:
    """A fitted codec, made once: codecs do not change."""
    return fit(name, side)


def codec_set(name: str = "rvq", seed: int = 0, **changes: Any) -> CodecSet:
    """Codecs of the two coded layers of `SPEC`."""

    def side(side: Side) -> tuple[Codec | None, ...]:
        return tuple(fit(name, side, seed + i, **changes) if layer.coded else None for i, layer in enumerate(SPEC.layers))

    info = {"seed": seed, "tokens": 300, "distortion": [[0.1, 0.2], None, [0.1, 0.3]]}
    return CodecSet(name, small_settings(name, **changes), SPEC, side("key"), side("value"), info)


def other_spec(**changes: Any) -> ModelSpec:
    return replace(SPEC, **changes)
