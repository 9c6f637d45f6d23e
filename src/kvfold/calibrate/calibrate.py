"""Fitting the codecs of a model: keys and values of sample text, gathered at the cache's own seam, then k-means.

Cost: one forward pass over the text, and for residual VQ about `2 * stages * iterations * max_vectors * codebook_size *
group` multiply-adds a layer and side. Memory: the model, `sample_tokens` tokens of K and V in float32, one layer's
k-means. The same seed on the same machine gives the same bytes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvfold.calibrate.text import builtin_text
from kvfold.codecs import Codec, build_codec, resolve_settings
from kvfold.codecs.artifact import CodecSet
from kvfold.config import ModelSpec
from kvfold.errors import InputError
from kvfold.integration.attach import hooked
from kvfold.integration.capture import CaptureCache
from kvfold.integration.spec import model_spec
from kvfold.progress import Progress

TOKENS = 32768
CONTEXT = 2048
SAMPLE_TOKENS = 16384


def calibrate(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str] | str | None = None,
    codec: str = "rvq",
    seed: int = 0,
    *,
    tokens: int = TOKENS,
    context: int = CONTEXT,
    settings: dict[str, Any] | None = None,
    quiet: bool = False,
) -> CodecSet:
    """Fit a codec of method `codec` for every layer's keys and values.

    Args:
        model, tokenizer: from transformers; the model is run in eval mode without gradients and left as it was.
        texts: text to calibrate on, joined in order; None for text that comes with every Python installation.
        codec: a name from `kvfold codecs`.
        seed: of sampling and k-means.
        tokens: tokens of the text to use at most.
        context: tokens of one forward pass (at most the model's context).
        settings: changes to the method's settings, as `--set` on the command line.
        quiet: no progress on standard error.

    Raises:
        InputError: empty text, too few tokens for the codebooks, unknown codec or setting, NaN or Inf in K or V.
        UnsupportedModelError: a model whose cache cannot be compressed.
    """
    spec = model_spec(model)
    chosen = resolve_settings(codec, settings or {}, spec.head_dim)
    unfitted = build_codec(codec, "key", spec.head_dim, chosen)
    windows = token_windows(tokenizer, texts, tokens, min(context, spec.max_positions))
    generator = torch.Generator().manual_seed(seed)
    total = sum(len(w) for w in windows)
    coded = sum(layer.coded for layer in spec.layers)
    if not quiet:
        size = 2 * coded * min(total, SAMPLE_TOKENS) * spec.kv_heads * spec.head_dim * 4
        print(
            f"calibrating {codec} on {total} tokens: {len(windows)} passes, then {2 * coded} fits; "
            f"samples take {size / 2**20:.0f} MiB",
            file=sys.stderr,
        )
    start = time.monotonic()
    cache = _collect(model, spec, windows, unfitted.pre_rope, generator, quiet)
    result = _fit(spec, cache, codec, chosen, generator, quiet)
    if not quiet:
        print(f"calibrated in {time.monotonic() - start:.0f} s", file=sys.stderr)
    info = {**result.info, "seed": seed, "tokens": total, "text": "builtin" if texts is None else "given"}
    return CodecSet(result.method, result.settings, spec, result.keys, result.values, info)


def token_windows(tokenizer: Any, texts: Sequence[str] | str | None, tokens: int, context: int) -> list[Tensor]:
    """The first `tokens` tokens of the text, cut into windows of `context`; a remainder of less than 2 is dropped."""
    if tokens < 2:
        raise InputError("--tokens of at least 2", str(tokens), "raise it")
    parts = builtin_text() if texts is None else [texts] if isinstance(texts, str) else list(texts)
    text = "\n\n".join(part for part in parts if part.strip())
    if not text:
        raise InputError("calibration text", "none (empty or only white space)", "give a file with text")
    text = text[: 64 * tokens]  # far more characters than any tokenizer packs into that many tokens
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"][0][:tokens]
    windows = [w for w in ids.split(context) if len(w) > 1]
    if not windows:
        raise InputError("calibration text of at least 2 tokens", f"{len(ids)}", "give more text")
    return windows


@torch.no_grad()
def _collect(
    model: Any, spec: ModelSpec, windows: list[Tensor], pre_rope: bool, generator: torch.Generator, quiet: bool
) -> CaptureCache:
    """Run the windows through the model and keep an even sample of tokens of every layer."""
    total = sum(len(w) for w in windows)
    chosen = torch.randperm(total, generator=generator)[:SAMPLE_TOKENS].sort().values
    cache = CaptureCache(spec, pre_rope)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    start = 0
    try:
        with hooked(model, lambda: cache), Progress("reading text", len(windows), quiet) as step:
            for window in windows:
                inside = chosen[(chosen >= start) & (chosen < start + len(window))]
                cache.choose((inside - start).to(device))
                model(input_ids=window[None].to(device), use_cache=True, logits_to_keep=1)
                start += len(window)
                step()
    finally:
        model.train(training)
    return cache


def _fit(
    spec: ModelSpec, cache: CaptureCache, method: str, settings: dict[str, Any], generator: torch.Generator, quiet: bool
) -> CodecSet:
    keys: list[Codec | None] = []
    values: list[Codec | None] = []
    distortion: list[list[float] | None] = []
    count = 0
    steps = sum(layer.coded for layer in spec.layers) * 2 * build_codec(method, "key", spec.head_dim, settings).fit_steps
    with Progress("fitting codebooks", steps, quiet) as step:
        for index, layer in enumerate(spec.layers):
            samples = cache.samples(index)
            if not layer.coded:
                keys.append(None)
                values.append(None)
                distortion.append(None)
                continue
            key = build_codec(method, "key", spec.head_dim, settings)
            value = build_codec(method, "value", spec.head_dim, settings)
            errors = []
            for codec, sample in ((key, samples[0]), (value, samples[1])):
                codec.fit(sample, generator, step)
                errors.append(codec.distortion(sample[:, :2048]))
            keys.append(key)
            values.append(value)
            distortion.append(errors)
            count = samples[0].shape[1]
    info = {"samples": count, "distortion": distortion}
    return CodecSet(method, settings, spec, tuple(keys), tuple(values), info)
