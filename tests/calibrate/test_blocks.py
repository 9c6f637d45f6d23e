"""Shifts and scales trained block by block (`kvfold/calibrate/blocks.py`)."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from tiny import CONFIGS, random_ids, tiny_codecs, tiny_model, tiny_tokenizer

import kvfold
from kvfold.calibrate.blocks import AHEAD, Blocks, train_blocks
from kvfold.calibrate.text import builtin_text
from kvfold.codecs.wkvquant import WkvQuantCodec

WINDOWS = [random_ids(1, 100, seed)[0] for seed in range(5)]


def started(family: str = "llama", bits: int = 5) -> kvfold.CodecSet:
    return tiny_codecs(family, "wkvquant", bits=bits, group=16)


def trained(steps: int = 60, seed: int = 0, family: str = "llama") -> kvfold.CodecSet:
    generator = torch.Generator().manual_seed(seed)
    return train_blocks(tiny_model(family), started(family), WINDOWS, steps, generator, quiet=True)


@pytest.mark.parametrize("family", list(CONFIGS))
def test_blocks_run_one_at_a_time_are_the_model(family: str) -> None:
    model, ids = tiny_model(family), WINDOWS[0]
    blocks = Blocks(model, started(family), ids)
    with torch.no_grad():
        hidden = blocks.first(ids)
        expected = model(input_ids=ids[None], output_hidden_states=True, use_cache=False).hidden_states
        for index in range(len(blocks) - 1):  # the last of them is behind the final norm
            hidden = blocks.run(hidden, index, index + 1)
            assert torch.allclose(hidden, expected[index + 1], rtol=1e-4, atol=1e-4)


def test_a_block_reads_as_the_cache_does() -> None:
    """All blocks coded, one after another, against a pass with codes in the cache."""
    model, codecs, ids = tiny_model("llama"), started(bits=8), WINDOWS[0]
    blocks = Blocks(model, codecs, ids)
    pairs: Any = list(zip(codecs.keys, codecs.values, strict=True))
    with torch.no_grad():
        hidden = blocks.first(ids)
        for index, pair in enumerate(pairs):
            hidden = blocks.run(hidden, index, index + 1, pair)
        exact = model(input_ids=ids[None], use_cache=False).logits
        with kvfold.attach(model, codecs, sinks=0, window=0, block=1):
            expected = model(input_ids=ids[None], use_cache=True).logits
        got = model.lm_head(model.model.norm(hidden))
    # hidden states differ by float32's rounding, which tips a code now and then
    assert float((got - expected).norm()) < 0.05 * float((exact - expected).norm())


def test_training_lowers_the_loss_on_held_out_text() -> None:
    told = trained().info["blocks"]
    assert told["steps"] == 60
    before, after = (sum(losses[i] for losses in told["loss"]) for i in (0, 1))
    assert after < 0.98 * before
    assert all(losses[1] <= losses[0] for losses in told["loss"])


def test_the_loss_is_the_error_after_the_block_and_after_those_that_follow() -> None:
    model, codecs = tiny_model("llama"), started()
    blocks, pairs = Blocks(model, codecs, WINDOWS[0]), list(zip(codecs.keys, codecs.values, strict=True))
    pair: Any = pairs[0]
    with torch.no_grad():
        hidden = blocks.first(WINDOWS[0])
        near = blocks.run(hidden, 0, 1)
        far = blocks.run(near, 1, 1 + AHEAD)
        loss = blocks.loss(hidden, 0, pair, near, far)
        off = blocks.run(hidden, 0, 1, pair)
        off_later = blocks.run(off, 1, 3)
    assert float(loss.near) == pytest.approx(float((off - near).square().mean() / near.square().mean()), rel=1e-4)
    assert float(loss.far) == pytest.approx(float((off_later - far).abs().mean() / far.abs().mean()), rel=1e-4)


def test_what_became_worse_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["kvfold.calibrate.blocks"], "RATE", 3.0)
    spoilt = trained(steps=3)
    assert spoilt.fingerprint() == started().fingerprint()
    assert all(losses[0] == losses[1] for losses in spoilt.info["blocks"]["loss"])


def test_the_same_seed_gives_the_same_codecs_and_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = train_blocks(model, started(), WINDOWS, 3, torch.Generator().manual_seed(0), quiet=True)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert first.fingerprint() == trained(steps=3).fingerprint()
    for codec in (*first.keys, *first.values):
        assert isinstance(codec, WkvQuantCodec)
        assert not codec.shift.requires_grad
        assert not codec.scale.requires_grad


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt-neox", "phi3"])
def test_other_families_train_too(family: str) -> None:
    """On a random model rounding alone decides where 60 steps end, so some of a few runs have to be better than their start."""
    for seed in range(4):
        told = trained(family=family, seed=seed).info["blocks"]["loss"]
        assert [losses is None for losses in told] == [codec is None for codec in started(family).keys]
        if any(losses[1] < losses[0] for losses in told if losses):
            return
    pytest.fail("no run ended better than it started")


def test_calibration_trains_if_asked() -> None:
    settings = {"train_steps": 2, "group": 16}
    how: dict[str, Any] = {"tokens": 600, "context": 100, "quiet": True}
    codecs = kvfold.calibrate(tiny_model("llama"), tiny_tokenizer(), builtin_text(), "wkvquant", settings=settings, **how)
    assert codecs.info["blocks"]["steps"] == 2
    settings["train_steps"] = 0
    codecs = kvfold.calibrate(tiny_model("llama"), tiny_tokenizer(), builtin_text(), "wkvquant", settings=settings, **how)
    assert "blocks" not in codecs.info
