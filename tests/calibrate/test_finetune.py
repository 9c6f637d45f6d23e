"""Finetuning: what is trained, what it does for the compressed cache, what is written; on tiny models."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from finetuned import HELD_OUT, QUICK, trained
from tiny import random_ids, tiny_codecs, tiny_model, tiny_tokenizer

import kvfold
from kvfold.calibrate.divergence import Divergence
from kvfold.calibrate.finetune import FinetuneSettings, _accumulate, _follow
from kvfold.calibrate.trainable import Weights, trainable
from kvfold.codecs.ema import EmaBooks
from kvfold.codecs.identity import IdentityCodec
from kvfold.evaluate import evaluate
from kvfold.integration.attach import hooked
from kvfold.integration.models import load_model
from kvfold.integration.straight_through import CodedSide, StraightThroughCache

LORA = pytest.param("lora", marks=pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed"))


def copied(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: Any, before: dict[str, torch.Tensor]) -> set[str]:
    after = model.state_dict()
    assert after.keys() == before.keys()
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")),
        ("qwen2", ("q_proj.weight", "q_proj.bias", "k_proj.weight", "v_proj.weight", "v_proj.bias", "o_proj.weight")),
        ("qwen3", ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")),
        ("gemma3", ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")),
        ("phi3", ("qkv_proj.weight", "o_proj.weight")),
        ("gpt-neox", ("query_key_value.weight", "dense.weight", "dense.bias")),
    ],
)
def test_the_attention_projections_of_all_layers_change_and_nothing_else(family: str, names: tuple[str, ...]) -> None:
    model = tiny_model(family)
    before = copied(model)
    result = trained(model, tiny_codecs(family, "rvq-paper"), loss="lm")
    assert result.model is model
    got = changed(model, before)
    assert {name for name in got if not name.endswith(("k_proj.bias", "value.bias"))} == {
        name for name in before if name.endswith(names) and ("attn" in name or "attention" in name)
    }
    assert len(got) >= 3 * len(names)


def test_kl_brings_the_compressed_model_back_to_the_exact_one() -> None:
    """On text it was not trained on, in nats a token."""
    ids = tiny_tokenizer()(HELD_OUT, return_tensors="pt")["input_ids"][:, :400]

    def divergence(model: Any, codecs: kvfold.CodecSet) -> float:
        with torch.no_grad():
            exact = tiny_model("llama")(input_ids=ids).logits[0].log_softmax(-1)
            with kvfold.attach(model, codecs, sinks=0, window=0, block=1):
                coded = model(input_ids=ids).logits[0].log_softmax(-1)
        return float(torch.nn.functional.kl_div(coded, exact, log_target=True, reduction="batchmean"))

    model, codecs = tiny_model("llama"), tiny_codecs("llama", "rvq-paper")
    before = divergence(model, codecs)
    result = trained(model, codecs, steps=30, tokens_per_step=100, context=100, lr=1e-2)
    assert divergence(model, result.codecs) < 0.92 * before
    first, last = (sum(row["loss"] for row in result.curve[part]) / 5 for part in (slice(5), slice(-5, None)))
    assert last < 0.92 * first


def test_lm_lowers_the_perplexity_through_the_cache() -> None:
    model, codecs = tiny_model("llama"), tiny_codecs("llama", "rvq-paper")

    def perplexity(codecs: kvfold.CodecSet) -> float:
        return evaluate(model, tiny_tokenizer(), codecs, HELD_OUT, context=200, windows=4, quiet=True).perplexity

    before = perplexity(codecs)
    result = trained(model, codecs, loss="lm", steps=30, tokens_per_step=100, context=100, lr=3e-3)
    assert perplexity(result.codecs) < 0.4 * before
    assert result.curve[-1]["loss"] < result.curve[0]["loss"] - 1


def test_kl_is_to_the_model_as_it_was() -> None:
    """The teacher's logits stay what they were, bit for bit, while the weights move."""
    model, ids = tiny_model("llama"), random_ids(1, 30)
    cache = StraightThroughCache(tiny_codecs("llama", "rvq-paper"))
    settings = FinetuneSettings(**QUICK)
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
    with trainable(model, "all-attention", 1e-2, 1, 0) as weights, hooked(model, lambda: cache):
        losses = []
        for _ in range(3):
            losses.append(_accumulate(model, weights, cache, ids[0], settings)[0])
            weights.step()
            torch.testing.assert_close(weights.original_model(input_ids=ids, use_cache=False).logits, want, rtol=0, atol=0)
    with torch.no_grad():
        assert not torch.equal(model(input_ids=ids, use_cache=False).logits, want)
        with kvfold.attach(untouched := tiny_model("llama"), tiny_codecs("llama", "rvq-paper"), sinks=0, window=0, block=1):
            coded = untouched(input_ids=ids).logits[0].log_softmax(-1)
    divergence = torch.nn.functional.kl_div(coded, want[0].log_softmax(-1), log_target=True, reduction="batchmean")
    assert losses[0] == pytest.approx(float(divergence), rel=1e-3)


def test_the_divergence_and_its_gradient_are_torchs() -> None:
    coded, exact = torch.randn(150, 97, requires_grad=True), torch.randn(150, 97)
    again = coded.detach().clone().requires_grad_()
    loss = Divergence.apply(coded, exact)
    want = torch.nn.functional.kl_div(again.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="batchmean")
    torch.testing.assert_close(loss, want)
    (3 * loss).backward()
    (3 * want).backward()
    torch.testing.assert_close(coded.grad, again.grad, rtol=1e-4, atol=1e-7)


def test_gradients_of_a_steps_sequences_are_averaged() -> None:
    model, rows = tiny_model("llama"), random_ids(2, 40)
    cache = StraightThroughCache(tiny_codecs("llama", "rvq-paper"))

    def gradient(ids: list[torch.Tensor]) -> torch.Tensor:
        settings = FinetuneSettings(context=40, tokens_per_step=40 * len(ids))
        with trainable(model, "all-attention", 1e-3, 1, 0) as weights, hooked(model, lambda: cache):
            for row in ids:
                _accumulate(model, weights, cache, row, settings)
            return weights.live["model.layers.1.self_attn.k_proj.weight"].grad.clone()

    alone = [gradient([row]) for row in rows]
    torch.testing.assert_close(gradient(list(rows)), (alone[0] + alone[1]) / 2, rtol=1e-4, atol=1e-7)


def test_a_step_takes_as_many_sequences_as_its_tokens_need() -> None:
    settings = [FinetuneSettings(context=100, tokens_per_step=n).passes for n in (100, 101, 200, 2)]
    assert settings == [1, 2, 2, 1]


def test_bfloat16_weights_move_by_steps_too_small_for_them() -> None:
    layer = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(0.05)  # its neighbour in bfloat16 is 0.00024 away
    weights = Weights(layer, dict(layer.named_parameters()), lr=1e-5)
    for _ in range(40):
        layer.weight.grad = torch.ones_like(layer.weight)
        weights.collect()
        weights.step()
    assert float(layer.weight.detach()) == pytest.approx(0.05 - 40e-5, abs=1.5e-4)


def test_gradients_of_bfloat16_weights_add_up_in_float32() -> None:
    """1 + 0.001 is 1 in bfloat16."""
    layer = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    weights = Weights(layer, dict(layer.named_parameters()), lr=1e-3)
    for gradient in (1.0, 0.001, -1.0):
        layer.weight.grad = torch.full_like(layer.weight, gradient)
        weights.collect()
    master = weights._masters[0]
    assert layer.weight.grad is None
    assert float(master.grad) == pytest.approx(0.001, rel=1e-2)


@pytest.mark.parametrize("train", ["all-attention", LORA])
def test_a_bfloat16_model_stays_one(world: Path, train: str) -> None:
    model, _ = load_model(str(world / "model"), "bfloat16")
    before = copied(model)
    trained(model, train=train)
    assert changed(model, before)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("train", [LORA])
def test_lora_adds_matrices_of_its_rank_and_leaves_plain_layers(train: str) -> None:
    model = tiny_model("llama")
    before, kinds = copied(model), [type(m) for m in model.modules()]
    trained(model, train=train, rank=2, lr=1e-2, steps=5)
    names = changed(model, before)
    assert len(names) == 12
    for name in names:
        assert int(torch.linalg.matrix_rank(model.state_dict()[name] - before[name], rtol=1e-3)) in (1, 2)
    assert [type(m) for m in model.modules()] == kinds
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("train", ["all-attention", LORA])
def test_the_same_seed_gives_the_same_weights_and_codebooks(train: str, tmp_path: Path) -> None:
    one, two, other = (trained(seed=seed, train=train) for seed in (1, 1, 2))
    assert not changed(one.model, copied(two.model))
    assert one.codecs.fingerprint() == two.codecs.fingerprint()
    assert [row["loss"] for row in one.curve] == [row["loss"] for row in two.curve]
    assert changed(one.model, copied(other.model))
    assert one.codecs.fingerprint() != other.codecs.fingerprint()


def test_codebooks_follow_unless_they_are_frozen() -> None:
    codecs = tiny_codecs("llama", "rvq-paper")
    fingerprint = codecs.fingerprint()
    moved, frozen = trained(), trained(ema=False)
    assert moved.codecs.fingerprint() != fingerprint
    assert frozen.codecs.fingerprint() == codecs.fingerprint() == fingerprint
    for old, new in zip(codecs.keys, moved.codecs.keys, strict=True):
        step = (new.codebooks.float() - old.codebooks.float()).norm() / old.codebooks.float().norm()
        assert 1e-4 < float(step) < 0.2  # three updates of 1 % each


def test_codebooks_start_with_the_weight_of_a_steps_mean_count() -> None:
    """Codewords chosen 10 times each, by vectors off by 0.5: a step of decay 0.99 moves them by 0.005, not by 0.045."""
    side = CodedSide(tiny_codecs("llama", "rvq-paper").keys[0])
    old = side.codec.codebooks.float()
    books = EmaBooks(old, decay=0.99)
    side.counts = torch.full(old.shape[:2], 10.0)
    side.sums = 10 * (old + 0.5)
    _follow(side, books, first=True)
    torch.testing.assert_close(side.codec.codebooks.float(), old + 0.005, rtol=0, atol=2e-3)
    torch.testing.assert_close(side.codec.codebooks.float(), books.tables, rtol=0, atol=0)  # what passes read is what is saved


def test_following_codebooks_serve_the_changed_model_better() -> None:
    """Values that all became twice as large in half of their channels: the books learn it, frozen ones cannot."""

    def skewed() -> Any:
        model = tiny_model("llama")
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.v_proj.weight[::2] *= 2
        return model

    ends = [trained(skewed(), ema=ema, decay=0.5, steps=15, lr=1e-8).curve[-1]["value_distortion"] for ema in (True, False)]
    assert ends[0] < 0.9 * ends[1]


def test_commitment_lowers_the_distortion() -> None:
    plain, committed = (trained(commitment=beta, steps=40, lr=3e-3, ema=False).curve for beta in (0.0, 20.0))
    assert all(row["commitment"] == 0 for row in plain)
    assert all(row["commitment"] > 0 for row in committed)
    last = [sum(row["value_distortion"] for row in curve[-8:]) for curve in (plain, committed)]
    assert last[1] < 0.9 * last[0]


def test_checkpointing_changes_nothing_but_memory() -> None:
    plain, again = (trained(checkpointing=on, commitment=0.1) for on in (False, True))
    assert not changed(plain.model, copied(again.model))
    assert plain.codecs.fingerprint() == again.codecs.fingerprint()


def test_one_side_alone_may_be_compressed() -> None:
    result = trained(codecs=tiny_codecs("llama", "rvq-paper").only("key"))
    assert all(isinstance(codec, IdentityCodec) for codec in result.codecs.values)
    assert result.curve[-1]["value_distortion"] == 0 < result.curve[-1]["key_distortion"]


def test_the_curve_and_the_codecs_tell_what_was_done() -> None:
    result = trained(seed=4, tokens_per_step=100)
    assert [row["step"] for row in result.curve] == [1, 2, 3]
    assert {"loss", "commitment", "key_distortion", "value_distortion", "seconds"} < result.curve[0].keys()
    told = result.codecs.info["finetune"]
    assert (told["steps"], told["seed"], told["loss"], told["lr"], told["tokens_per_step"]) == (3, 4, "kl", 1e-3, 100)
    pairs = result.codecs.info["distortion"]
    assert sum(pair[0] for pair in pairs) / 3 == pytest.approx(result.curve[-1]["key_distortion"])


def test_stopping_keeps_the_steps_done() -> None:
    asked: list[int] = []
    result = trained(steps=50, stop=lambda: asked.append(1) or len(asked) == 4)
    assert len(result.curve) == result.codecs.info["finetune"]["steps"] == 4
    assert not changed(result.model, copied(trained(steps=4).model))


@pytest.mark.parametrize("train", ["all-attention", LORA])
def test_an_interrupted_training_leaves_the_model_as_it_was(train: str) -> None:
    model = tiny_model("llama").train()
    model.model.layers[0].mlp.requires_grad_(False)
    before, wanted = copied(model), [p.requires_grad for p in model.parameters()]

    def interrupt() -> bool:
        assert train == "lora" or changed(model, before)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(model, train=train, checkpointing=True, stop=interrupt)
    assert not changed(model, before)
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


def test_what_is_saved_loads_and_reads_through_the_cache_alike(tmp_path: Path) -> None:
    result, folder, ids = trained(), tmp_path / "out", random_ids(1, 50)
    result.save(folder, tiny_tokenizer())
    model, tokenizer = load_model(str(folder))
    codecs = kvfold.load(folder / "codec")
    logits = []
    for one, books in ((result.model, result.codecs), (model, codecs)):
        with torch.no_grad(), kvfold.attach(one, books):
            logits.append(one(input_ids=ids).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=0)
    assert codecs.info == json.loads(json.dumps(result.codecs.info))
    assert tokenizer("hello")["input_ids"] == tiny_tokenizer()("hello")["input_ids"]
    rows = [json.loads(line) for line in (folder / "finetune.jsonl").read_text().splitlines()]
    assert rows == result.curve
    if importlib.util.find_spec("matplotlib"):
        assert (folder / "finetune.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "codec").stat().st_mode & 0o700 == 0o700
    with pytest.raises(kvfold.InputError, match="a new folder"):
        result.save(folder, tiny_tokenizer())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"steps": 0}, "--steps of at least 1"),
        ({"context": 1}, "--context of at least 2"),
        ({"context": 600}, "at most the model's 512"),
        ({"tokens_per_step": 0}, "--tokens-per-step"),
        ({"rank": 0}, "--rank"),
        ({"loss": "mse"}, "--loss among kl, lm"),
        ({"train": "everything"}, "--train among all-attention, lora"),
        ({"lr": 0.0}, "--lr above 0"),
        ({"lr": float("nan")}, "--lr above 0"),
        ({"commitment": -1.0}, "--commitment"),
        ({"decay": 1.0}, "a decay"),
        ({"text": "  "}, "calibration text"),
        ({"text": "x"}, "at least 2 tokens"),
        ({"codecs": tiny_codecs("llama", "identity")}, "a residual codec"),
        ({"codecs": tiny_codecs("qwen3")}, "model type qwen3"),
        ({"lr": 1e30, "steps": 5}, "NaN or Inf|a finite loss"),
    ],
)
def test_bad_input_is_told_in_three_parts(how: dict[str, Any], message: str) -> None:
    model = tiny_model("llama")
    before = copied(model)
    with pytest.raises(kvfold.InputError, match=message) as caught:
        trained(model, **how)
    assert str(caught.value).startswith("expected ")
    assert "; got " in str(caught.value)
    assert not changed(model, before)


def test_a_missing_peft_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(kvfold.InputError, match=r"pip install kvfold\[lora\]"):
        trained(train="lora")
