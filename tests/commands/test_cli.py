"""Options, and what an error looks like."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_world import Ran, refused

from kvfold.commands import inspect


@pytest.mark.parametrize(
    "argv", [[], ["nonsense"], ["bench"], ["bench", "nonsense"], ["eval", "x"], ["calibrate", "x"], ["inspect"]], ids=" ".join
)
def test_wrong_use(run: Callable[..., Ran], argv: list[str]) -> None:
    refused(run(*argv), "--help")


@pytest.mark.parametrize("command", ["", "calibrate", "inspect", "generate", "eval", "codecs", "bench generate"])
def test_help(run: Callable[..., Ran], command: str) -> None:
    ran = run(*command.split(), "--help")
    assert (ran.status, ran.err) == (0, "")
    if command:
        for option in ("--seed", "--threads", "--device", "--dtype"):
            assert option in ran.out


def test_other_failures_are_short_unless_asked(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: Any) -> None:
        raise RuntimeError("boom\nand more")

    monkeypatch.setattr(inspect, "codecs", fail)
    ran = run("codecs")
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.count("\n") == 1
    assert "RuntimeError: boom" in ran.err
    monkeypatch.setenv("KVFOLD_DEBUG", "1")
    assert "Traceback" in run("codecs").err


def test_interrupted(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "codecs", interrupt)
    assert run("codecs") == Ran(130, "", "kvfold: interrupted\n")


def test_as_a_program() -> None:
    script = Path(sys.executable).with_name("kvfold")
    assert subprocess.run([script, "codecs"], capture_output=True, text=True).stdout.startswith("codec ")
    wrong = subprocess.run([sys.executable, "-m", "kvfold", "inspect", "/no/such"], capture_output=True, text=True)
    refused(Ran(wrong.returncode, wrong.stdout, wrong.stderr), "/no/such")
