"""`kvfold finetune`."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from finetuned import trained

import kvfold
from kvfold.calibrate.trainable import Weights
from kvfold.cli import main
from kvfold.integration.models import load_model


def command(world: Path, out: Path, *more: str) -> list[str]:
    parts = ["finetune", str(world / "model"), "--codec", str(world / "codec"), "--text", str(world / "text.txt")]
    return [*parts, "--out", str(out), "--context", "60", "--tokens-per-step", "60", *more]


def test_the_command_writes_what_the_function_makes(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(world, tmp_path / "out", "--steps", "3", "--lr", "1e-3", "--seed", "5")) == 0
    out, err = capsys.readouterr()
    assert "3 of 3 steps, kl loss" in out
    assert "finetuning 36,864 numbers (all-attention) by kl: 3 steps of 1 x 60 tokens" in err
    assert ", loss " in err
    want = trained(seed=5)
    made, _ = load_model(str(tmp_path / "out"))
    for name, tensor in made.state_dict().items():  # its attention is torch's, here it is eager: last bits differ
        torch.testing.assert_close(tensor, want.model.state_dict()[name], rtol=0, atol=1e-4)
    pairs = (kvfold.load(tmp_path / "out" / "codec").info["distortion"], want.codecs.info["distortion"])
    torch.testing.assert_close(*(torch.tensor(pair) for pair in pairs), rtol=1e-2, atol=0)


def test_options_of_the_command_arrive(world: Path, tmp_path: Path) -> None:
    options = ["--loss", "lm", "--no-ema", "--commitment", "0.5", "--ema-decay", "0.9", "--gradient-checkpointing"]
    assert main(command(world, tmp_path / "out", "--steps", "2", "--rank", "3", *options)) == 0
    told = kvfold.load(tmp_path / "out" / "codec").info["finetune"]
    want = {"loss": "lm", "ema": False, "commitment": 0.5, "decay": 0.9, "checkpointing": True, "rank": 3, "steps": 2}
    assert {name: told[name] for name in want} == want


def test_ctrl_c_keeps_the_steps_done(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    real, calls = Weights.step, []

    def step(self: Weights) -> None:
        calls.append(real(self))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Weights, "step", step)
    before = signal.getsignal(signal.SIGINT)
    assert main(command(world, tmp_path / "out", "--steps", "50")) == 130
    assert "2 of 50 steps" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before
    assert kvfold.load(tmp_path / "out" / "codec").info["finetune"]["steps"] == 2


def test_ctrl_c_twice_leaves_nothing(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: Weights) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Weights, "step", step)
    assert main(command(world, tmp_path / "out")) == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "0"], "not a whole number of at least 1"),
        (["--lr", "-1"], "not a number above 0"),
        (["--loss", "mse"], "invalid choice"),
        (["--commitment", "-2"], "--commitment of at least 0"),
        (["--context", "600"], "at most the model's 512"),
        (["--dtype", "float16"], "float32 or bfloat16"),
        (["--text", "nowhere.txt"], "nothing at nowhere.txt"),
    ],
)
def test_wrong_options_end_with_2_and_write_nothing(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(command(world, tmp_path / "out", *more)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_never_replaced(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(path.name for path in (world / "model").iterdir())
    assert main(command(world, world / "model")) == 2
    assert "nothing was changed" in capsys.readouterr().err
    assert sorted(path.name for path in (world / "model").iterdir()) == files
