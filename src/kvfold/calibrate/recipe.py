"""A name for a calibration: equal where the codecs would be, different where they could differ."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import Tensor

from kvfold.integration.spec import model_spec


def recipe_of(model: Any, told: list[Any]) -> str:
    """SHA-256 over the model's shape and weights, and everything calibration was told (JSON-able, or lists of tensors)."""
    weights = [(name, float(p.double().sum()), float(p.double().square().sum())) for name, p in model.state_dict().items()]
    facts = [model_spec(model).fingerprint(), weights, told]
    plain = lambda x: x.tolist() if isinstance(x, Tensor) else str(x)  # noqa: E731
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=plain).encode()).hexdigest()
