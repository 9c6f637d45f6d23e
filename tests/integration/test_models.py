"""Models that accelerate spreads over devices: what is kept on disk stands in for a second GPU here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

import kvfold
from kvfold.integration.models import input_device, load_model

_SMALL = {"group": 4, "codebook_size": 16, "stages": 2, "iterations": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def calibrated(model: torch.nn.Module, ema: kvfold.Ema | None = None) -> str:
    text = "Some words to calibrate on. " * 30
    method, settings = ("rvq-paper", _SMALL) if ema else ("rvq", {**_SMALL, "distill_steps": 2})
    made = kvfold.calibrate(model, tiny_tokenizer(), text, method, context=100, settings=settings, ema=ema, quiet=True)
    return made.fingerprint()


def test_auto_is_accelerates_placement(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    load = AutoModelForCausalLM.from_pretrained

    def remembering(*args: Any, **kwargs: Any) -> Any:
        asked.update(kwargs)
        return load(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", remembering)
    model, _ = load_model(str(folder), device="auto")
    assert asked.pop("device_map") == "auto"
    assert input_device(model) == torch.device("cpu")
    plain, _ = load_model(str(folder))
    assert "device_map" not in asked
    assert calibrated(model) == calibrated(plain)


def test_layers_in_several_places_calibrate_alike(folder: Path, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "disk", "model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
    assert {parameter.device.type for parameter in spread.parameters()} == {"cpu", "meta"}
    assert next(spread.parameters()).device.type == "meta"
    assert input_device(spread) == torch.device("cpu")
    plain, _ = load_model(str(folder))
    ema = kvfold.Ema(steps=2, batch_tokens=200)
    assert calibrated(spread, ema) == calibrated(plain, ema)
    with pytest.raises(kvfold.InputError, match="a model on one device"), kvfold.attach(spread, None):
        pass


def test_auto_without_accelerate_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "accelerate" else find(name, *rest))
    with pytest.raises(kvfold.InputError, match="the package accelerate"):
        load_model(str(folder), device="auto")
