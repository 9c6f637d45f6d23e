"""Fitting the codecs of a model: keys and values of sample text, gathered at the cache's own seam, then k-means; with
`ema`, codebooks then learn on from a stream of text (`ema.py`). Methods that ask for it are told facts of the model
(`integration/facts.py`), such as which errors the loss feels, and codebooks with `distill_steps` are trained end to end
(`distill.py`), parameters with `train_steps` block by block (`blocks.py`). With a `budget`, layers of high width are chosen by
the divergence from the exact model (`search.py`).

Cost: one forward pass over (at most `READ_TOKENS` of) the text, and for residual VQ about `2 * stages * iterations *
max_vectors * codebook_size * group` multiply-adds a layer and side; see there for sensitivity and training. Memory: the model,
`SAMPLE_TOKENS` tokens of K and V in float32, one layer's k-means. The same seed on the same machine gives the same bytes.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.calibrate.blocks import train_blocks
from kvfold.calibrate.distill import CONTEXT as CONTEXT_OF_A_STEP
from kvfold.calibrate.distill import distill
from kvfold.calibrate.ema import Ema, learn
from kvfold.calibrate.readings import Readings
from kvfold.calibrate.recipe import recipe_of
from kvfold.calibrate.search import search
from kvfold.calibrate.sources import Texts, sources_of
from kvfold.calibrate.stages import Stages
from kvfold.calibrate.stream import first_windows
from kvfold.calibrate.text import builtin_text, own_samples
from kvfold.codecs import Codec, Side, build_codec, resolve_settings, settle
from kvfold.codecs.artifact import CodecSet
from kvfold.codecs.base import Facts
from kvfold.config import ModelSpec
from kvfold.errors import InputError
from kvfold.integration.capture import CaptureCache, capturing
from kvfold.integration.facts import facts_of
from kvfold.integration.spec import model_spec
from kvfold.progress import Progress

TOKENS = 131072
CONTEXT = 2048
READ_TOKENS = 32768  # whose keys and values are looked at
SAMPLE_TOKENS = 16384  # whose keys and values are kept
SENSITIVITY_TOKENS = 8192
_SENSITIVITY_CONTEXT = 1024
_TESTED = 2048  # tokens whose distortion is told


def calibrate(
    model: Any,
    tokenizer: Any,
    texts: Texts | None = None,
    codec: str = "rvq",
    seed: int = 0,
    *,
    tokens: int = TOKENS,
    context: int = CONTEXT,
    settings: dict[str, Any] | None = None,
    ema: Ema | None = None,
    checkpoint: str | Path | None = None,
    readings: Readings | None = None,
    quiet: bool = False,
) -> CodecSet:
    """Fit a codec of method `codec` for every layer's keys and values.

    Args:
        model, tokenizer: from transformers; the model is run in eval mode without gradients and left as it was.
        texts: text to calibrate on, joined in order; None for what the model itself says (with `ema`: for the documentation
            that comes with Python). A `Path` is a file and is streamed, as is a data set of the hub, `HubText(name)`.
        codec: a name from `kvfold codecs`.
        seed: of sampling and k-means.
        tokens: tokens of the text to use at most.
        context: tokens of one forward pass (at most the model's context).
        settings: changes to the method's settings, as `--set` on the command line.
        ema: learn the codebooks further by moving average, over all of the text and several times over if it is short.
            Under torchrun, all processes share the work and return the same codecs.
        checkpoint: folder for the stages of a calibration that trains (`distill_steps`), in which an interrupted one goes on;
            it is removed at the end. For `ema` see there.
        readings: of the same model, to share what is read of it with other calibrations.
        quiet: no progress on standard error.

    Raises:
        InputError: empty text, too few tokens for the codebooks, unknown codec or setting, NaN or Inf in K or V.
        UnsupportedModelError: a model whose cache cannot be compressed.
    """
    spec = model_spec(model)
    chosen = resolve_settings(codec, settings or {}, spec.head_dim)
    if ema is not None:  # which moves codewords towards the mean of their vectors, so what serves other ends is left out
        chosen.update({name: type(chosen[name])(0) for name in ("weight_power", "distill_steps", "center") if name in chosen})
    text = "given" if texts is not None else "own samples" if ema is None else "builtin"
    blank = _blank(spec, codec, chosen, {"seed": seed, "text": text})

    shared = readings or Readings()

    def fit(windows: list[Tensor]) -> CodecSet:
        return _fit_windows(model, blank, windows, None if checkpoint is None else Path(checkpoint), shared, quiet)

    if ema is not None:
        sources = sources_of(builtin_text() if texts is None else texts)
        return learn(model, tokenizer, sources, blank, fit, ema, tokens=tokens, context=context, quiet=quiet)
    if texts is None:
        _require_tokens(tokens)
        written = min(tokens, SAMPLE_TOKENS)  # no more than is sampled from them: writing is the slow part
        write = partial(own_samples, model, tokenizer, written, spec.max_positions, seed, quiet)
        return fit(shared.get(("own samples", written), (), torch.Generator().manual_seed(seed), write))
    return fit(token_windows(tokenizer, texts, tokens, min(context, spec.max_positions)))


def _blank(spec: ModelSpec, method: str, settings: dict[str, Any], info: dict[str, Any]) -> CodecSet:
    """A set of unfitted codecs."""
    keys, values = (
        tuple(
            build_codec(method, side, spec.head_dim, settings, i) if layer.coded else None
            for i, layer in enumerate(spec.layers)
        )
        for side in ("key", "value")
    )
    return CodecSet(method, settings, spec, keys, values, info)


def _fit_windows(
    model: Any, blank: CodecSet, windows: list[Tensor], folder: Path | None, readings: Readings, quiet: bool
) -> CodecSet:
    """Codecs like those of `blank`, fitted on the windows, and trained if their settings say so."""
    generator = torch.Generator().manual_seed(blank.info["seed"])
    steps = blank.settings.get("distill_steps", 0)
    start = time.monotonic()
    if blank.settings.get("budget"):
        blank = _within_budget(model, blank, windows, quiet)
    stages = Stages(folder, recipe_of(model, [blank.method, blank.settings, blank.info, windows])) if folder and steps else None
    if stages is not None and stages.step is not None:
        result = stages.fitted(generator)
        if not quiet:
            print(f"going on in {folder}: codecs are fitted, {stages.step} of {steps} steps are done", file=sys.stderr)
    else:
        result = _fit_codecs(model, blank, windows, generator, readings, quiet)
        if blank.settings.get("train_steps"):
            result = train_blocks(model, result, windows, blank.settings["train_steps"], generator, quiet)
        if stages is not None:
            stages.keep_fitted(result, steps, generator)
    if steps:
        result = distill(model, result, windows, steps, generator, stages, quiet)
    if stages is not None:
        stages.remove()
    if not quiet:
        print(f"calibrated in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return replace(result, info={**result.info, **blank.info, "tokens": sum(map(len, windows))})


def _within_budget(model: Any, blank: CodecSet, windows: list[Tensor], quiet: bool) -> CodecSet:
    """`blank` with the layers of high width that the model finds best; `info["search"]` tells what was measured."""

    def make(keys: int, values: int) -> CodecSet:
        chosen = {**blank.settings, "key_layers": keys, "value_layers": values}
        return _blank(blank.spec, blank.method, chosen, blank.info)

    best, found = search(model, make, blank.settings["budget"], windows, quiet)
    told = {"search": [[*pair, divergence] for pair, divergence in found.items()]}
    return replace(make(*best), info={**blank.info, **told})


def _fit_codecs(
    model: Any, blank: CodecSet, windows: list[Tensor], generator: torch.Generator, readings: Readings, quiet: bool
) -> CodecSet:
    """Codecs like those of `blank`, fitted on the windows."""
    spec, method = blank.spec, blank.method
    total = sum(len(w) for w in windows)
    coded = [codec for codec in blank.keys if codec is not None]
    steps = blank.settings.get("distill_steps", 0)
    both = [codec for codec in (*blank.keys, *blank.values) if codec is not None]
    read = _spread(windows, READ_TOKENS if any(codec.learns for codec in both) else _TESTED)
    wants = frozenset().union(*(codec.wants for codec in both))
    felt = [w[:_SENSITIVITY_CONTEXT] for w in _spread(read, 2 * SENSITIVITY_TOKENS)] if wants else []
    if not quiet:
        seen = sum(map(len, read))
        size = 2 * len(coded) * min(seen, SAMPLE_TOKENS) * spec.kv_heads * spec.head_dim * 4
        parts = [f"{len(read)} passes", f"{len(felt)} for {' and '.join(sorted(wants))}" if felt else ""]
        parts += [f"{2 * len(coded)} fits", f"{steps} steps of {CONTEXT_OF_A_STEP} tokens" if steps else ""]
        listed = ", then ".join(filter(None, parts))
        print(f"calibrating {method} on {total} tokens: {listed}; samples take {size / 2**20:.0f} MiB", file=sys.stderr)
    positions, pre_rope = coded[0].reads_positions, coded[0].pre_rope
    collect = partial(_collect, model, spec, read, positions, generator, quiet)
    cache = readings.get(("samples", positions), read, generator, collect)
    measure = partial(facts_of, model, spec, wants, felt, pre_rope, generator, quiet)
    facts = readings.get(("facts", wants, pre_rope), felt, generator, measure)
    return _fit(spec, cache, method, blank.settings, facts, generator, quiet)


def _spread(windows: list[Tensor], tokens: int) -> list[Tensor]:
    """Windows at even distances that come to about `tokens` tokens; all of them if they have no more."""
    count = max(1, round(len(windows) * tokens / sum(map(len, windows))))
    return windows if count >= len(windows) else [windows[i * len(windows) // count] for i in range(count)]


def token_windows(tokenizer: Any, texts: Texts, tokens: int, context: int) -> list[Tensor]:
    """The first `tokens` tokens of the text, cut into windows of `context`; a remainder of less than 2 is dropped."""
    _require_tokens(tokens)
    parts: list[Any] = list(texts) if isinstance(texts, (list, tuple)) else [texts]
    if not all(isinstance(part, str) for part in parts):
        return first_windows(tokenizer, sources_of(parts), tokens, context)
    text = "\n\n".join(part for part in parts if part.strip())
    if not text:
        raise InputError("calibration text", "none (empty or only white space)", "give a file with text")
    text = text[: 64 * tokens]  # far more characters than any tokenizer packs into that many tokens
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"][0][:tokens]
    windows = [w for w in ids.split(context) if len(w) > 1]
    if not windows:
        raise InputError("calibration text of at least 2 tokens", f"{len(ids)}", "give more text")
    return windows


def _require_tokens(tokens: int) -> None:
    if tokens < 2:
        raise InputError("--tokens of at least 2", str(tokens), "raise it")


def _collect(
    model: Any, spec: ModelSpec, windows: list[Tensor], pre_rope: bool, generator: torch.Generator, quiet: bool
) -> CaptureCache:
    """Run the windows through the model and keep an even sample of tokens of every layer."""
    total = sum(len(w) for w in windows)
    chosen = torch.randperm(total, generator=generator)[:SAMPLE_TOKENS].sort().values
    cache = CaptureCache(spec, pre_rope)
    start = 0
    with capturing(model, cache) as read, Progress("reading text", len(windows), quiet) as step:
        for window in windows:
            cache.choose(chosen[(chosen >= start) & (chosen < start + len(window))] - start)
            read(window)
            start += len(window)
            step()
    return cache


def _fit(
    spec: ModelSpec,
    cache: CaptureCache,
    method: str,
    settings: dict[str, Any],
    facts: list[tuple[Facts, Facts]],
    generator: torch.Generator,
    quiet: bool,
) -> CodecSet:
    fitted: tuple[list[Codec | None], list[Codec | None]] = ([], [])
    tested: list[tuple[Tensor, Tensor]] = []
    count = 0
    sides: tuple[Side, Side] = ("key", "value")
    each = sum(build_codec(method, side, spec.head_dim, settings).fit_steps for side in sides)
    steps = sum(layer.coded for layer in spec.layers) * each
    with Progress("fitting codebooks", steps, quiet) as step:
        for index, layer in enumerate(spec.layers):
            samples = list(cache.samples(index))
            for number, (side, done, known) in enumerate(zip(sides, fitted, facts[index], strict=True)):
                codec = build_codec(method, side, spec.head_dim, settings, index) if layer.coded else None
                if codec is not None:
                    place = partial(cache.place, index) if codec.centers else None
                    codec.fit(samples[number], generator, step, replace(known, place=place))
                    if codec.center is not None and place is not None:
                        samples[number] = place(samples[number] - codec.center[:, None])
                done.append(codec)
            tested.append((samples[0][:, :_TESTED].clone(), samples[1][:, :_TESTED].clone()))
            count = samples[0].shape[1]
    keys, values = settle(method, *fitted, settings)
    distortion = [
        None if key is None or value is None else [key.distortion(sample[0]), value.distortion(sample[1])]
        for key, value, sample in zip(keys, values, tested, strict=True)
    ]
    info = {"samples": count, "distortion": distortion}
    return CodecSet(method, settings, spec, tuple(keys), tuple(values), info)
