"""What kvfold needs to know of a model, as plain data: it is saved with every codec and compared at every attach.

`integration/spec.py` reads it off a live model; nothing here touches transformers.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass

from kvfold.errors import InputError

_ROUNDING = 2**-7


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding of one layer type (Su et al., arXiv 2104.09864).

    Attributes:
        inv_freq: inverse frequencies, radians per position, one row per regime. One row normally; "longrope" has two,
            short and long, and switches when a forward pass reaches beyond `switch_length` positions.
        factor: constant the rotated channels are multiplied by (yarn, longrope); 1.0 otherwise.
        interleaved: pairs are (0, 1), (2, 3), ...; otherwise (0, n), (1, n + 1), ... with n = len(inv_freq row).
        switch_length: positions up to which regime 0 holds; None with one regime.
    """

    inv_freq: tuple[tuple[float, ...], ...]
    factor: float = 1.0
    interleaved: bool = False
    switch_length: int | None = None


@dataclass(frozen=True)
class LayerSpec:
    """One attention layer: `coded` or kept exact (a sliding-window layer), and which entry of `ModelSpec.ropes` it uses."""

    coded: bool
    rope: int | None


@dataclass(frozen=True)
class ModelSpec:
    """The shape of a model's KV cache: `G` KV heads, `H` query heads, head dim `D`, and RoPE, layer by layer."""

    model_type: str
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]

    def rope(self, layer: int) -> RopeSpec | None:
        index = self.layers[layer].rope
        return None if index is None else self.ropes[index]

    @property
    def switch_length(self) -> int | None:
        """Positions at which a longrope model changes its frequencies, or None."""
        return next((r.switch_length for r in self.ropes if r.switch_length is not None), None)

    def fingerprint(self) -> str:
        """SHA-256 over everything above, hexadecimal: equal for models that can share a codec's shapes."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict) -> ModelSpec:
        ropes = tuple(
            RopeSpec(**{**r, "inv_freq": tuple(tuple(float(f) for f in row) for row in r["inv_freq"])}) for r in data["ropes"]
        )
        layers = tuple(LayerSpec(**layer) for layer in data["layers"])
        return cls(**{**data, "ropes": ropes, "layers": layers})

    def require_same(self, model: ModelSpec) -> None:
        """Raise InputError unless a codec made for `self` fits `model`, naming the first difference."""
        for field, word in (
            ("model_type", "model type"),
            ("heads", "query heads"),
            ("kv_heads", "KV heads"),
            ("head_dim", "head dim"),
        ):
            mine, other = getattr(self, field), getattr(model, field)
            if mine != other:
                raise _other_model(f"{word} {mine}", f"{word} {other}")
        if len(self.layers) != len(model.layers):
            raise _other_model(f"{len(self.layers)} layers", f"{len(model.layers)} layers")
        for index, (mine, other) in enumerate(zip(self.layers, model.layers, strict=True)):
            if mine.coded != other.coded:
                raise _other_model(f"layer {index} {_kind(mine)}", f"layer {index} {_kind(other)}")
            if not _alike(self.rope(index), model.rope(index)):
                raise _other_model(f"layer {index} with its own RoPE frequencies", f"layer {index} with different RoPE")


def _alike(mine: RopeSpec | None, other: RopeSpec | None) -> bool:
    """Equal but for rounding: `model.to(torch.bfloat16)` rounds a model's frequencies to 8 bits too."""
    if mine is None or other is None:
        return mine is other
    same = (mine.interleaved, mine.switch_length) == (other.interleaved, other.switch_length)
    if not same or [len(row) for row in mine.inv_freq] != [len(row) for row in other.inv_freq]:
        return False
    pairs = [(mine.factor, other.factor)]
    pairs += [pair for rows in zip(mine.inv_freq, other.inv_freq, strict=True) for pair in zip(*rows, strict=True)]
    return all(math.isclose(a, b, rel_tol=_ROUNDING) for a, b in pairs)


def _kind(layer: LayerSpec) -> str:
    return "coded" if layer.coded else "exact (sliding)"


def _other_model(expected: str, got: str) -> InputError:
    return InputError(
        f"the model this codec was calibrated for ({expected})", f"a model with {got}", "calibrate a codec on this model"
    )
