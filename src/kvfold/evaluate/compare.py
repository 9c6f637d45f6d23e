"""Several codecs on one model under one protocol: quality through the cache against bits, and the speed of coding."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.calibrate.calibrate import TOKENS
from kvfold.calibrate.kept import calibrate_or_load
from kvfold.codecs import resolve_settings
from kvfold.codecs.artifact import CodecSet
from kvfold.errors import InputError
from kvfold.evaluate.evaluate import Evaluation, eval_windows, evaluate
from kvfold.integration.capture import CaptureCache, capturing
from kvfold.integration.spec import model_spec

CODECS = (
    *(f"rvq:bits={bits}" for bits in ("1.25", "1.75", "2.25", "3", "4")),
    "rvq-paper",
    *(f"turboquant:bits={bits}" for bits in (2, 3, 4)),
)
_TIMED_TOKENS = 1024


@dataclass(frozen=True)
class Compared:
    """One codec and its settings.

    Attributes:
        name: as it was asked for.
        encode_tokens_per_s, decode_tokens_per_s: tokens a second whose keys and values of all layers are coded, and decoded.
    """

    name: str
    codec: str
    settings: dict[str, Any]
    encode_tokens_per_s: float
    decode_tokens_per_s: float
    evaluation: Evaluation

    def to_json(self) -> dict[str, Any]:
        own = {name: value for name, value in asdict(self).items() if name != "evaluation"}
        return {**self.evaluation.to_json(), "perplexity_ratio": self.evaluation.perplexity_ratio, **own}


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
    each: Callable[[Compared], None] = lambda row: None,
    quiet: bool = False,
) -> list[Compared]:
    """Calibrate, evaluate and time every codec, in the order given.

    Args:
        calibration_text, seed, tokens: as in `kvfold.calibrate`, the same for all.
        text, context, windows, sinks, window: as in `evaluate`.
        codecs: names from `kvfold codecs`, settings after colons: `rvq:bits=3`.
        keep: folder of calibrated codecs; those that are there are not calibrated again.
        each: called with every row as it is done.

    Raises:
        InputError: an unknown codec or setting, told before anything runs, or bad input to calibration or evaluation.
    """
    spec = model_spec(model)
    asked = [(name, *parse_codec(name)) for name in codecs]
    for _, method, settings in asked:
        resolve_settings(method, settings, spec.head_dim)
    eval_windows(tokenizer, text, context, windows, spec.max_positions)
    rows = []
    for name, method, settings in asked:
        fitted = calibrate_or_load(model, tokenizer, calibration_text, method, settings, seed, tokens, keep, quiet)
        sizes = {"context": context, "windows": windows, "sinks": sinks, "window": window}
        result = evaluate(model, tokenizer, fitted, text, **sizes, quiet=quiet)
        ids = eval_windows(tokenizer, text, min(context, _TIMED_TOKENS), 1, spec.max_positions)[0]
        row = Compared(name, method, fitted.settings, *_speeds(model, fitted, ids), result)
        each(row)
        rows.append(row)
    return rows


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
