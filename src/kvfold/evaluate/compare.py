"""Several codecs on one model under one protocol: quality through the cache against bits, and the speed of coding."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.bench.record import circumstances
from kvfold.calibrate.calibrate import TOKENS
from kvfold.calibrate.kept import calibrate_or_load
from kvfold.calibrate.readings import Readings
from kvfold.calibrate.recipe import recipe_of
from kvfold.codecs import METHODS, resolve_settings
from kvfold.codecs.artifact import CodecSet
from kvfold.errors import InputError
from kvfold.evaluate.evaluate import eval_windows, evaluate
from kvfold.evaluate.exact import ExactModel
from kvfold.evaluate.rows import Compared, Failed, KeptRows
from kvfold.integration.capture import CaptureCache, capturing
from kvfold.integration.models import input_device
from kvfold.integration.spec import model_spec

CODECS = tuple(f"{name}:{settings}".rstrip(":") for name, row in METHODS.items() for settings in row.compared)
ROWS, KEPT = "rows.jsonl", "codecs"  # in the folder `keep`
_TIMED_TOKENS = 1024


def parse_codec(name: str) -> tuple[str, dict[str, str]]:
    """`"rvq:bits=3:beam=8"` as method and settings.

    Raises:
        InputError: a part without `=`; unknown methods and settings are told by `resolve_settings`.
    """
    method, *pairs = name.split(":")
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals and value):
            raise InputError("a codec such as rvq:bits=3", repr(name), "write name:setting=value")
        settings[key] = value
    return method, settings


def compare(
    model: Any,
    tokenizer: Any,
    calibration_text: Sequence[str] | str | None,
    text: Sequence[str] | str,
    *,
    codecs: Sequence[str] = CODECS,
    seed: int = 0,
    tokens: int = TOKENS,
    context: int = 2048,
    windows: int = 8,
    sinks: int = 0,
    window: int = 0,
    keep: Path | None = None,
    quiet: bool = False,
) -> list[Compared | Failed]:
    """Calibrate, evaluate and time every codec, in the order given; one that fails is told and does not stop the others.

    Args:
        calibration_text, seed, tokens: as in `kvfold.calibrate`, the same for all.
        text, context, windows, sinks, window: as in `evaluate`.
        codecs: names from `kvfold codecs`, settings after colons: `rvq:bits=3`.
        keep: folder of finished rows, `rows.jsonl`, and calibrated codecs, `codecs/`; what is there is not done again.
        quiet: no progress on standard error.

    Raises:
        InputError: unknown codec or setting, bad sizes, no text, another's `rows.jsonl`; told before anything runs.
    """
    spec = model_spec(model)
    asked = [(name, *parse_codec(name)) for name in codecs]
    chosen = [(name, method, resolve_settings(method, changes, spec.head_dim)) for name, method, changes in asked]
    ids = eval_windows(tokenizer, text, context, windows, spec.max_positions)
    sizes = {"context": context, "windows": windows, "sinks": sinks, "window": window}
    told = [calibration_text, seed, tokens, text, sizes, str(model.dtype), input_device(model).type]
    kept = KeptRows(None if keep is None else keep / ROWS, recipe_of(model, told)[:16])
    folder = None if keep is None else keep / KEPT
    readings, exact = Readings(), ExactModel(model)  # what rows have in common is done once

    def measured(name: str, method: str, settings: dict[str, Any]) -> Compared:
        fitted = calibrate_or_load(model, tokenizer, calibration_text, method, settings, seed, tokens, folder, readings, quiet)
        result = evaluate(model, tokenizer, fitted, text, **sizes, exact_model=exact, quiet=quiet)
        return Compared(name, method, settings, *_speeds(model, fitted, ids[0][:_TIMED_TOKENS]), result, circumstances())

    def tell(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr, flush=True)

    there = sum(kept.find(method, settings) is not None for _, method, settings in chosen)
    where = "" if keep is None else f", {there} of them in {keep / ROWS} already"
    tell(f"{len(chosen)} rows{where}; {len(chosen) - there} to calibrate and measure, {len(ids)} x {len(ids[0])} tokens each")
    rows: list[Compared | Failed] = []
    start = time.monotonic()
    for number, (name, method, settings) in enumerate(chosen, 1):
        row: Compared | Failed
        at = f"[{number}/{len(chosen)}] {name}:"
        if (found := kept.find(method, settings)) is not None:
            row = replace(found, name=name)
            tell(f"{at} {_said(row)}, measured before")
        else:
            try:
                row = measured(name, method, settings)
            except Exception as error:
                if os.environ.get("KVFOLD_DEBUG") == "1":
                    traceback.print_exc()
                row = Failed(name, method, settings, _first_line(error))
                tell(f"{at} failed: {row.error}")
            else:
                kept.add(row)
                tell(f"{at} {_said(row)}, {time.monotonic() - start:.0f} s so far")
        rows.append(row)
    return rows


def _said(row: Compared) -> str:
    result = row.evaluation
    return f"{result.bits_per_element:.3f} bits, {result.perplexity_ratio:.4f} x exact, KL {result.kl_mean:.4f}"


def _first_line(error: Exception) -> str:
    """What the command line says of an error."""
    first = next(iter(str(error).strip().splitlines()), "no message")
    return first if isinstance(error, InputError) else f"{type(error).__name__}: {first}"


def _speeds(model: Any, codecs: CodecSet, ids: Tensor) -> tuple[float, float]:
    """Tokens a second that are encoded and decoded, all layers, the second of two runs."""
    pre_rope = next(codec.pre_rope for codec in codecs.keys if codec is not None)
    cache = CaptureCache(codecs.spec, pre_rope)
    cache.choose(torch.arange(len(ids)))
    with capturing(model, cache) as read:
        read(ids)
    placed, device = codecs.to(model.device), model.device
    states = [
        (codec, x[None].to(device))
        for i, pair in enumerate(zip(placed.keys, placed.values, strict=True))
        for codec, x in zip(pair, cache.samples(i), strict=True)
        if codec is not None
    ]
    seconds = [0.0, 0.0]
    for _ in range(2):
        start = time.perf_counter()
        coded = [codec.encode(x) for codec, x in states]
        middle = time.perf_counter()
        for (codec, _x), codes in zip(states, coded, strict=True):
            codec.decode(codes)
        seconds = [middle - start, time.perf_counter() - middle]
    return len(ids) / seconds[0], len(ids) / seconds[1]
