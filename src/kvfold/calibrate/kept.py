"""Calibrations kept in a folder under a name made of everything they depend on, so that a run of many can be resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvfold.calibrate.calibrate import calibrate
from kvfold.codecs import resolve_settings
from kvfold.codecs.artifact import CodecSet, load
from kvfold.integration.spec import model_spec


def calibrate_or_load(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str] | str | None,
    codec: str,
    settings: dict[str, Any],
    seed: int,
    tokens: int,
    keep: Path | None,
    quiet: bool,
) -> CodecSet:
    """`kvfold.calibrate`, or the codecs that an earlier call with the same arguments left in the folder `keep` (None: none)."""
    folder = None
    if keep is not None:
        chosen = resolve_settings(codec, settings, model_spec(model).head_dim)
        folder = keep / _name(model, [codec, chosen, seed, tokens, texts])
        if folder.exists():
            return load(folder)
    fitted = calibrate(model, tokenizer, texts, codec, seed, tokens=tokens, settings=settings, quiet=quiet)
    if folder is not None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fitted.save(folder)
    return fitted


def _name(model: Any, recipe: list[Any]) -> str:
    """A folder name that differs where the codecs would: by model, weights, and everything calibration was told."""
    weights = [(name, float(p.double().sum()), float(p.double().square().sum())) for name, p in model.state_dict().items()]
    facts = [model_spec(model).fingerprint(), weights, recipe]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
