"""Evaluation through the real cache, against sums written out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny import tiny_codecs, tiny_model, tiny_tokenizer

import kvfold
from kvfold.calibrate.text import builtin_text
from kvfold.evaluate import evaluate
from kvfold.evaluate.exact import ExactModel
from kvfold.integration.spec import decoder_of

TEXT = builtin_text()[0][:2000]


def run(method: str = "rvq", family: str = "llama", **how) -> kvfold.evaluate.Evaluation:
    how = {"context": 64, "windows": 3, **how}
    changes = how.pop("changes", {})
    model = how.pop("model", None) or tiny_model(family)
    return evaluate(model, tiny_tokenizer(), tiny_codecs(family, method, **changes), TEXT, quiet=True, **how)


def test_exact_perplexity_is_the_models_own_loss() -> None:
    model = tiny_model("llama")
    ids = tiny_tokenizer()(TEXT, return_tensors="pt")["input_ids"][0, : 3 * 64].view(3, 64)
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in ids]
    result = run()
    assert result.perplexity_exact == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)
    assert (result.tokens, result.windows) == (3 * 63, 3)


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # gemma2 caps its logits after the head
def test_shared_passes_of_the_exact_model_change_nothing(family: str) -> None:
    alone = run(family=family)
    model = tiny_model(family)
    shared = {"family": family, "model": model, "exact_model": ExactModel(model)}
    first = run(**shared)
    layer = decoder_of(model).layers[0]
    exact_passes = []
    undo = layer.register_forward_hook(lambda *told: exact_passes.append(True))
    try:
        second = run(**shared)
    finally:
        undo.remove()
    assert replace(first, seconds=0) == replace(second, seconds=0) == replace(alone, seconds=0)
    assert len(exact_passes) == 3  # the compressed model's alone, one a window
    assert "forward" not in vars(decoder_of(model))


def test_the_identity_codec_loses_nothing() -> None:
    result = run("identity", "gemma2")
    assert result.perplexity == pytest.approx(result.perplexity_exact, rel=1e-5)
    assert result.kl_mean == pytest.approx(0, abs=1e-6)
    assert result.top1_agreement == 1.0


def test_loss_is_seen_inside_a_single_window() -> None:
    """One forward pass a window: a cache that gave the pass exact keys and values would be indistinguishable from none."""
    result = run(windows=1)
    assert result.kl_mean > 0.05
    assert result.top1_agreement < 1.0
    assert result.kl_p99 > result.kl_mean


def test_more_exact_tokens_and_more_bits_come_closer() -> None:
    kl = [run(sinks=s, window=w).kl_mean for s, w in ((0, 0), (0, 16), (4, 48))]
    assert kl[0] > kl[1] > kl[2] > 0
    assert run(changes={"stages": 6, "codebook_size": 64}).kl_mean < kl[0]
    assert run(window=64).kl_mean == pytest.approx(0, abs=1e-6)


def test_window_counts_to_the_token() -> None:
    """After 64 tokens a window of 16 and 4 sinks leave 44 as codes, whatever the cache's block."""
    result = run(sinks=4, window=16)
    exact, coded = 20 * 32, 44 * 8 * 6 / 16
    assert result.bits_per_element == pytest.approx((exact + coded) / 64)


def test_bits_and_bytes_are_the_formulas() -> None:
    result = run()
    assert result.bits_per_element == 3.0
    assert result.bytes_bf16 == 64 * 3 * 2 * 2 * 16 * 2
    assert result.bytes_cache == result.bytes_bf16 * 3 / 16


def test_short_text_gives_what_windows_it_has() -> None:
    model, codecs = tiny_model("llama"), tiny_codecs("llama")
    assert evaluate(model, tiny_tokenizer(), codecs, TEXT[:150], context=64, windows=8, quiet=True).windows == 2
    assert evaluate(model, tiny_tokenizer(), codecs, TEXT[:50], context=64, windows=8, quiet=True).tokens == 49


@pytest.mark.parametrize(
    ("text", "how", "message"),
    [
        ("", {}, "text to evaluate"),
        (" \n ", {}, "text to evaluate"),
        ("a", {}, "at least 2 tokens"),
        (TEXT, {"context": 1}, "--context"),
        (TEXT, {"context": 513}, "the model's 512"),
        (TEXT, {"windows": 0}, "--windows"),
        (TEXT, {"sinks": -1}, "sinks"),
    ],
)
def test_bad_input_is_told(text: str, how: dict, message: str) -> None:
    with pytest.raises(kvfold.InputError, match=message):
        evaluate(tiny_model("llama"), tiny_tokenizer(), tiny_codecs("llama"), text, quiet=True, **{"context": 64, **how})


def test_codecs_of_another_model_are_refused() -> None:
    with pytest.raises(kvfold.InputError, match="model type"):
        evaluate(tiny_model("qwen3"), tiny_tokenizer(), tiny_codecs("llama"), TEXT, context=64, quiet=True)
