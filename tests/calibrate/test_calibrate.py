"""Calibration: same seed, same bytes; bad input told; the model left as it was."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

import kvfold
from kvfold.calibrate.readings import Readings
from kvfold.calibrate.text import builtin_text, own_samples

TEXT = builtin_text()
SMALL = {"group": 4, "codebook_size": 16, "stages": 2, "iterations": 3, "distill_steps": 2}


def calibrated(model=None, texts=TEXT, seed=0, tokens=600, codec="rvq", settings=SMALL, **more) -> kvfold.CodecSet:
    model = tiny_model("llama") if model is None else model
    return kvfold.calibrate(
        model, tiny_tokenizer(), texts, codec, seed, tokens=tokens, settings=settings, context=100, quiet=True, **more
    )


def folder_bytes(codecs: kvfold.CodecSet, folder: Path) -> list[bytes]:
    codecs.save(folder)
    return [file.read_bytes() for file in sorted(folder.iterdir())]


def test_same_seed_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    first = folder_bytes(calibrated(), tmp_path / "a")
    assert folder_bytes(calibrated(), tmp_path / "b") == first
    assert folder_bytes(calibrated(seed=1), tmp_path / "c") != first


def test_shared_readings_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as alone, though the text is read once for all keys before RoPE, and once for those after it."""
    asked = [
        (seed, {**SMALL, "rope": rope, **change})
        for seed in (0, 1)
        for rope in ("pre", "post")
        for change in ({}, {"stages": 3})
    ]
    alone = [calibrated(seed=seed, settings=settings).fingerprint() for seed, settings in asked]
    whole = sys.modules["kvfold.calibrate.calibrate"]
    collected: list[bool] = []
    collect = whole._collect  # type: ignore[attr-defined]
    monkeypatch.setattr(whole, "_collect", lambda *args: collected.append(True) or collect(*args))
    readings = Readings()
    shared = [calibrated(seed=seed, settings=settings, readings=readings).fingerprint() for seed, settings in asked]
    assert shared == alone
    assert len(collected) <= 4  # one a seed and whether positions are read


def test_the_models_own_text_is_written_once_for_shared_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = calibrated(texts=None).fingerprint()
    readings = Readings()
    assert calibrated(texts=None, readings=readings).fingerprint() == alone
    monkeypatch.setattr(sys.modules["kvfold.calibrate.calibrate"], "own_samples", lambda *told: pytest.fail("written again"))
    assert calibrated(texts=None, readings=readings).fingerprint() == alone


def test_what_is_written_tells_where_it_came_from() -> None:
    info = calibrated(seed=3).info
    told = {k: v for k, v in info.items() if k not in ("distortion", "distill")}
    assert told == {"seed": 3, "tokens": 600, "text": "given", "samples": 600}
    assert info["distill"]["steps"] == 2
    assert all(0 < error < 1 for pair in info["distortion"] for error in pair)


def test_more_stages_distort_less() -> None:
    errors = [calibrated(settings={**SMALL, "stages": s, "distill_steps": 0}).info["distortion"] for s in (1, 2, 4)]
    for layer in range(3):
        for side in (0, 1):
            assert errors[0][layer][side] > errors[1][layer][side] > errors[2][layer][side]


def test_sliding_layers_get_no_codec() -> None:
    codecs = calibrated(tiny_model("gemma3"))
    assert [c is None for c in codecs.keys] == [True, False, False]
    assert [d is None for d in codecs.info["distortion"]] == [True, False, False]


def test_without_text_the_model_writes_its_own() -> None:
    codecs = calibrated(texts=None)
    assert (codecs.info["text"], codecs.info["tokens"]) == ("own samples", 600)
    assert codecs.fingerprint() == calibrated(texts=None).fingerprint()
    assert codecs.fingerprint() != calibrated(texts=None, seed=1).fingerprint()


def test_own_samples_are_what_the_model_says_and_leave_the_random_state_alone() -> None:
    model = tiny_model("llama").train()
    before = torch.random.get_rng_state()
    windows = own_samples(model, tiny_tokenizer(), 1100, 512, seed=0, quiet=True)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training
    assert [len(window) for window in windows] == [512, 512, 76]
    with torch.no_grad():
        said = -model.eval()(input_ids=windows[0][None]).logits[0, :-1].log_softmax(-1)
    of_samples = said.gather(1, windows[0][1:, None]).mean()
    assert of_samples < said.mean() - 1  # likelier than tokens picked without the model


def test_texts_are_joined() -> None:
    text = builtin_text()
    assert calibrated(texts="\n\n".join(text)).fingerprint() == calibrated(texts=text).fingerprint()
    assert calibrated(texts=["hello world, " * 50, "and more. " * 30]).fingerprint() != calibrated().fingerprint()


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibrated(model)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"texts": ""}, "calibration text"),
        ({"texts": ["  \n", "\t"]}, "calibration text"),
        ({"texts": []}, "calibration text"),
        ({"texts": "x"}, "at least 2 tokens"),
        ({"tokens": 1}, "--tokens"),
        ({"texts": "only a few", "settings": {**SMALL, "codebook_size": 4096}}, "4096 sample vectors"),
        ({"codec": "rqv"}, "'rqv'"),
        ({"settings": {"stage": 3}}, "'stage'"),
        ({"settings": {"stages": "many"}}, "'many'"),
        ({"settings": {"group": 5}}, "divides the head dim"),
        ({"settings": {"rope": "mid"}}, "'mid'"),
        ({"settings": {"group": 4, "bits": 0.2}}, "bits of at least"),
    ],
)
def test_bad_input_is_told_in_three_parts(how: dict, message: str) -> None:
    with pytest.raises(kvfold.InputError, match=message) as caught:
        calibrated(**how)
    assert str(caught.value).startswith("expected ")
    assert "; got " in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("texts", [None, TEXT], ids=["own samples", "given"])
def test_nan_and_inf_in_keys_are_told(bad: float, texts: list[str] | None) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = bad
    with pytest.raises(kvfold.InputError, match="NaN or Inf"):
        calibrated(model, texts)
