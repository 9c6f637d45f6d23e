"""Every bad input that a command can be given: status 2, one message in three parts, nothing half-written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_world import PROMPT, SIZES, SMALL, Ran, World, files, refused, save_model
from tiny import random_ids, tiny_model
from transformers import AutoModelForCausalLM

import kvfold


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "nothing at"), (b"", "empty"), (b"  \n\t\n", "empty"), (b"w10 \xff\xfe", "UTF-8"), ("folder", "directory")],
    ids=["missing", "empty", "white", "undecodable", "folder"],
)
def test_bad_text(run: Callable[..., Ran], world: World, tmp_path: Path, content: bytes | str | None, told: str) -> None:
    file = tmp_path / "bad.txt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content:
        file.mkdir()
    before = files(tmp_path)
    common = ["--codec", world.codec]
    refused(run("eval", world.model, *common, "--text", world.text, str(file)), told)
    refused(run("generate", world.model, *common, "--prompt-file", str(file)), told)
    refused(run("bench", "generate", world.model, *common, "--contexts", "16", "--text", str(file)), told)
    refused(run("calibrate", world.model, "--out", str(tmp_path / "out"), "--text", str(file), *SMALL), told)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--tokens", "3", *SMALL], ("16",)),  # fewer vectors than codewords
        (["--tokens", "1", *SMALL], ("--tokens",)),
        (["--tokens", "many"], ("--tokens", "'many'")),
        (["--codec", "nonsense"], ("nonsense", "rvq-paper")),
        (["--set", "nonsense=1"], ("nonsense", "codebook_size")),
        (["--set", "stages"], ("stages", "key=value")),
        (["--set", "stages=few"], ("stages", "few")),
        (["--set", "stages=0", "--set", "group=8"], ("stages",)),
        (["--set", "group=5"], ("group=5", "head dim 16")),
        (["--set", "group=8", "--set", "codebook_size=1"], ("codebook_size",)),
        (["--set", "group=8", "--set", "codebook_size=65537"], ("65536",)),
        (["--set", "group=8", "--set", "key_groups=random"], ("random", "strided")),
        (["--set", "group=8", "--set", "bits=0.1"], ("bits",)),
        (["--device", "nowhere"], ("device", "nowhere")),
        (["--dtype", "int3"], ("int3", "float32")),
        (["--threads", "0"], ("--threads",)),
        (["--nonsense"], ("--nonsense",)),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_calibrate_refuses(
    run: Callable[..., Ran], world: World, tmp_path: Path, options: list[str], told: tuple[str, ...]
) -> None:
    refused(run("calibrate", world.model, "--out", str(tmp_path / "out"), "--text", world.text, *options), *told)
    assert not list(tmp_path.iterdir())


def test_calibrate_refuses_a_folder_with_other_files(run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    before = files(tmp_path)
    given = ["calibrate", world.model, "--text", world.text, *SMALL, "--out"]
    ran = run(*given, str(tmp_path))
    refused(ran, "other files")
    assert "calibrating" not in ran.err  # told before the work, not after it
    refused(run(*given, str(tmp_path / "no" / "such")), "no")
    assert files(tmp_path) == before


def test_not_a_number_in_keys(run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    def spoil(model: Any) -> None:
        model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = torch.nan

    model = save_model(tmp_path / "model", spoil)
    before = set(tmp_path.iterdir())
    refused(run("calibrate", model, "--out", str(tmp_path / "out"), "--text", world.text, *SMALL), "NaN")
    refused(run("generate", model, "--codec", world.codec, "--prompt", PROMPT, "--save-cache", str(tmp_path / "c")), "NaN")
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("family", "told"), [("mistral", "llama"), ("gpt-neox", "llama"), ("llama-llama3-rope", "RoPE")], ids=lambda v: v
)
def test_codec_of_another_model(run: Callable[..., Ran], world: World, tmp_path: Path, family: str, told: str) -> None:
    model = save_model(tmp_path / "other", family=family)
    refused(run("generate", model, "--codec", world.codec, "--prompt", PROMPT), told)
    refused(run("eval", model, "--codec", world.codec, "--text", world.text, "--context", "64"), told)


def test_bench_tells_bad_input_of_its_measuring_process(run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    model = save_model(tmp_path / "other", family="mistral")
    refused(run("bench", "generate", model, "--codec", world.codec, "--contexts", "16", "--json", "-"), "llama")
    for contexts in ("600", "0", "16,", "-4"):
        refused(run("bench", "generate", model, "--codec", world.codec, "--contexts", contexts), "contexts")


@pytest.mark.parametrize("name", ["nowhere", "folder", "no/such/folder/here", "model.gguf"])
def test_no_such_model(
    run: Callable[..., Ran], world: World, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no retries of a hub that is out of reach
    (tmp_path / "folder").mkdir()
    refused(run("generate", name, "--codec", world.codec, "--prompt", PROMPT), name)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-40] ^= 1
    file.write_bytes(data)


def _swap(old: str, new: str) -> Callable[[Path], None]:
    def swap(file: Path) -> None:
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))

    return swap


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("codecs.safetensors", _cut),
        ("codecs.safetensors", _flip),
        ("codecs.safetensors", Path.unlink),
        ("codecs.json", _cut),
        ("codecs.json", Path.unlink),
        ("codecs.json", _swap('"kv_heads": 2', '"kv_heads": 4')),
        ("codecs.json", _swap('"stages": 2', '"stages": 3')),
        ("codecs.json", _swap('"kind": "residual"', '"kind": "nonsense"')),
        ("codecs.json", _swap('"version": 1', '"version": 99')),
        ("codecs.json", lambda file: file.write_text("[]")),
    ],
    ids=["cut", "flipped", "no-tensors", "cut-json", "no-json", "other-heads", "other-stages", "other-kind", "version", "list"],
)
def test_damaged_codec(run: Callable[..., Ran], world: World, tmp_path: Path, name: str, harm: Callable[[Path], None]) -> None:
    codec = tmp_path / "codec"
    shutil.copytree(world.codec, codec)
    harm(codec / name)
    before = files(codec)
    refused(run("inspect", str(codec)))
    refused(run("generate", world.model, "--codec", str(codec), "--prompt", PROMPT))
    assert files(codec) == before


def test_damaged_cache(generate: Callable[..., Ran], run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    saved, harmed = tmp_path / "cache", tmp_path / "harmed"
    assert generate("--prompt", PROMPT, "--max-new-tokens", "5", *SIZES, "--save-cache", str(saved)).status == 0
    for harm in (_cut, _flip, lambda file: file.write_text("nonsense"), Path.unlink):
        shutil.copy(saved, harmed)
        harm(harmed)
        refused(generate("--load-cache", str(harmed)), str(harmed))
    other = str(tmp_path / "other")
    assert run("calibrate", world.model, "--out", other, "--text", world.text, "--seed", "9", *SMALL).status == 0
    refused(generate("--load-cache", str(saved), codec=other), "codec")
    refused(generate("--load-cache", str(saved), "--window", "9"), "--window 8")
    refused(generate("--load-cache", str(saved), "--sinks", "3"), "--sinks 2")


def test_a_cache_saved_without_its_tokens_cannot_go_on(generate: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    model, codecs = AutoModelForCausalLM.from_pretrained(world.model), kvfold.load(world.codec)
    with kvfold.attach(model, codecs) as attached, torch.no_grad():
        model(input_ids=random_ids(1, 20))
        attached.cache.save(tmp_path / "bare")
        attached.cache.save(tmp_path / "full", random_ids(1, 20))
    refused(generate("--load-cache", str(tmp_path / "bare")), "tokens")
    refused(generate("--load-cache", str(tmp_path / "full")), "prompt")  # the model has nothing left to read
    assert generate("--load-cache", str(tmp_path / "full"), "--prompt", "w9", "--max-new-tokens", "2").status == 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "prompt"),
        (["--prompt", ""], "prompt"),
        (["--prompt", "   "], "prompt"),
        (["--prompt", "w9 " * 513], "512"),
        (["--prompt", PROMPT, "--max-new-tokens", "483"], "512"),
        (["--prompt", PROMPT, "--max-new-tokens", "0"], "--max-new-tokens"),
        (["--prompt", PROMPT, "--temperature", "0"], "--temperature"),
        (["--prompt", PROMPT, "--sinks", "-1"], "sinks"),
        (["--prompt", PROMPT, "--window", "-1"], "window"),
        (["--prompt", PROMPT, "--max-bytes", "1000"], "max_bytes"),
        (["--prompt", PROMPT, "--set", "stages=3"], "beam"),
        (["--prompt", PROMPT, "--set", "beam=0"], "beam"),
        (["--prompt", PROMPT, "--set", "beam=wide"], "beam"),
    ],
    ids=lambda value: " ".join(value)[-24:] if isinstance(value, list) else "",
)
def test_generate_refuses(
    generate: Callable[..., Ran], tmp_path: Path, options: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    forward = type(tiny_model("llama")).forward
    monkeypatch.setattr(
        type(tiny_model("llama")), "forward", lambda *args, **kwargs: passes.append(1) or forward(*args, **kwargs)
    )
    refused(generate(*options, "--save-cache", str(tmp_path / "c")), told)
    assert not list(tmp_path.iterdir())
    assert passes == ([1] if "--max-bytes" in options else [])  # max_bytes is checked as the pass begins


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--context", "513"], "512"),
        (["--context", "1"], "--context"),
        (["--windows", "0"], "--windows"),
        (["--sinks", "-1"], "sinks"),
        (["--set", "group=8"], "beam"),
        (["--json", "no/such/folder/x.json"], "folder"),
        (["--json", "."], "folder"),
        (["--record", "no/such/folder"], "folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_eval_refuses(run: Callable[..., Ran], world: World, options: list[str], told: str) -> None:
    given = ["eval", world.model, "--codec", world.codec, "--text", world.text, "--context", "64"]
    refused(run(*given, *options), told)
