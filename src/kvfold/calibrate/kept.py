"""Calibrations kept in a folder under a name made of everything they depend on, so that a run of many can be resumed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvfold.calibrate.calibrate import calibrate
from kvfold.calibrate.readings import Readings
from kvfold.calibrate.recipe import recipe_of
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
    readings: Readings,
    quiet: bool,
) -> CodecSet:
    """`kvfold.calibrate`, or the codecs that an earlier call with the same arguments left in the folder `keep` (None: none)."""
    folder = None
    if keep is not None:
        chosen = resolve_settings(codec, settings, model_spec(model).head_dim)
        folder = keep / recipe_of(model, [codec, chosen, seed, tokens, texts])[:16]
        if folder.exists():
            return load(folder)
    more: dict[str, Any] = {"tokens": tokens, "settings": settings, "readings": readings, "quiet": quiet}
    if folder is not None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        more["checkpoint"] = folder.with_name(folder.name + ".training")
    fitted = calibrate(model, tokenizer, texts, codec, seed, **more)
    if folder is not None:
        fitted.save(folder)
    return fitted
