"""`kvfold calibrate --ema-steps`: what it says and writes, and that it can be stopped at any moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import tiny_model, tiny_tokenizer

import kvfold
from kvfold.calibrate.text import builtin_text
from kvfold.cli import main

_SMALL = ["--set", "group=4", "--set", "codebook_size=16", "--set", "stages=2", "--set", "iterations=2"]
_SIZES = ["--tokens", "400", "--context", "100", "--ema-batch-tokens", "200", "--threads", "1"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("ema")
    tiny_model("llama").save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    (root / "text.txt").write_text("\n\n".join(builtin_text())[:5000])
    return ["calibrate", str(root / "model"), "--codec", "rvq-paper", "--text", str(root / "text.txt"), *_SMALL]


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("codecs.json", "codecs.safetensors")}


def test_cost_first_then_codec_curve_and_picture(base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "c"
    assert main([*base, *_SIZES, "--out", str(out), "--ema-steps", "4", "--ema-decay", "0.9", "--ema-reseed", "0.01"]) == 0
    said = capsys.readouterr()
    first = said.err.splitlines()[0]
    assert "4 steps of 2 x 100 tokens, 8 passes after k-means; statistics take" in first
    assert "bits per element" in said.out
    assert {file.name for file in out.iterdir()} == {"codecs.json", "codecs.safetensors", "ema.jsonl", "ema.png"}
    assert (out / "ema.png").read_bytes().startswith(b"\x89PNG")
    records = [json.loads(line) for line in (out / "ema.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    told = kvfold.load(out).info["ema"]
    assert (told["decay"], told["reseed"], told["tokens"]) == (0.9, 0.01, 800)
    assert main(["inspect", str(out), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["ema"] == told
    assert main(["inspect", str(out)]) == 0
    assert "4 steps of moving average over 800 tokens" in capsys.readouterr().out
    assert main([*base, *_SIZES, "--out", str(out), "--ema-steps", "2"]) == 0  # an older codec and its curve are replaced
    assert len((out / "ema.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_resumes_bit_for_bit(base: list[str], tmp_path: Path, how: signal.Signals) -> None:
    steps = ["--ema-steps", "60", "--checkpoint-every", "7"]
    assert main([*base, *_SIZES, *steps, "--out", str(tmp_path / "whole")]) == 0
    out, curve = tmp_path / "c", tmp_path / "c.ema" / "ema.jsonl"
    command = [*base, *_SIZES, *steps, "--out", str(out)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-m", "kvfold", *command], env=variables, stderr=subprocess.PIPE, text=True) as run:
        deadline = time.monotonic() + 60
        while not (curve.exists() and curve.read_text().count("\n") >= 10) and time.monotonic() < deadline:
            time.sleep(0.005)
        run.send_signal(how)
        _, said = run.communicate(timeout=60)
    assert run.returncode == (130 if how == signal.SIGINT else -how)
    assert not out.exists()
    header = json.loads((tmp_path / "c.ema" / "ema.json").read_text())
    taken = curve.read_text().count("\n")
    if how == signal.SIGINT:
        assert f"--resume goes on from {tmp_path / 'c.ema'}" in said
        assert header["step"] == taken >= 10
    else:
        assert header["step"] in (taken // 7 * 7, (taken // 7 - 1) * 7)
    assert taken < 60
    assert main([*command, "--resume"]) == 0
    assert files(out) == files(tmp_path / "whole")
    assert [json.loads(line)["step"] for line in (out / "ema.jsonl").read_text().splitlines()] == list(range(1, 61))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume"], "--ema-steps with --resume"),
        (["--ema-batch-tokens", "64"], "--ema-steps with --ema-batch-tokens"),
        (["--checkpoint-every", "64"], "--ema-steps with --checkpoint-every"),
        (["--ema-steps", "0"], "at least 1"),
        (["--ema-steps", "2", "--ema-reseed", "2"], "reseed"),
        (["--ema-steps", "2", "--text", "/nowhere.txt"], "nothing at /nowhere.txt"),
        (["--ema-steps", "2", "--checkpoint", "OUT"], "other than --out"),
        (["--ema-steps", "2", "--codec", "identity"], "residual method"),
        (["--ema-steps", "2", "--codec", "rvq"], "sharing=layer"),
        (["--ema-steps", "2", "--device", "tpu"], "a device torch can use"),
    ],
)
def test_wrong_options_are_told(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    out = str(tmp_path / "c")
    given = base[:6] if "identity" in options else base
    status = main([*given, "--out", out, *(out if option == "OUT" else option for option in options)])
    assert (status, message in (said := capsys.readouterr().err)) == (2, True), said


def test_the_device_may_be_left_to_accelerate(base: list[str], tmp_path: Path) -> None:
    for device in ("cpu", "auto"):
        assert main([*base, *_SIZES, "--out", str(tmp_path / device), "--ema-steps", "2", "--device", device]) == 0
    assert files(tmp_path / "auto") == files(tmp_path / "cpu")
