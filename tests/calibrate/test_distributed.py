"""Learning codebooks with two processes, as torchrun starts them, and one that dies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer

import kvfold
from kvfold import distributed
from kvfold.calibrate.checkpoint import Checkpoint
from kvfold.calibrate.text import builtin_text
from kvfold.cli import main

_SMALL = ["--set", "group=4", "--set", "codebook_size=16", "--set", "stages=2", "--set", "iterations=2"]


class World(NamedTuple):
    """What all tests share: the arguments of a run, and the learned state of one process, uninterrupted."""

    root: Path
    arguments: list[str]
    alone: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("ranks")
    tiny_model("llama").save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    (root / "text.txt").write_text("\n\n".join(builtin_text())[:5000])
    sizes = ["--tokens", "400", "--context", "100", "--ema-steps", "6", "--ema-batch-tokens", "500", "--threads", "1"]
    sizes += ["--ema-reseed", "0.4"]
    arguments = ["calibrate", str(root / "model"), "--codec", "rvq-paper", "--text", str(root / "text.txt"), *sizes, *_SMALL]
    assert main([*arguments, "--out", str(root / "alone")]) == 0
    assert sum(record["moved"] for record in Checkpoint(root / "alone.ema").curve()) > 0
    return World(root, arguments, state(root / "alone.ema"))


def state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Codebooks and accumulators in float32; the codec rounds them to float16."""
    (file,) = checkpoint.glob("*.safetensors")
    return load_file(file)


def torchrun(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **environment}
    return subprocess.run([*start, *command], env=variables, capture_output=True, text=True, timeout=120, check=False)


def same(mine: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        tolerance = 1e-5 if name.endswith("tables") else 1e-3  # sums run to hundreds
        torch.testing.assert_close(tensor, other[name], rtol=tolerance, atol=tolerance)


def test_two_processes_learn_what_one_does(world: World) -> None:
    out = world.root / "two"
    done = torchrun("-m", "kvfold", *world.arguments, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bits per element") == 1  # process 0 alone speaks
    assert done.stderr.count("6 steps of 5 x 100 tokens") == 1
    same(state(world.root / "two.ema"), world.alone)
    info, alone = kvfold.load(out).info, kvfold.load(world.root / "alone").info
    assert info["ema"]["tokens"] == alone["ema"]["tokens"] == 3000
    steps = [record["step"] for record in Checkpoint(world.root / "two.ema").curve()]
    assert steps == list(range(1, 7))


def test_a_process_that_dies_leaves_a_checkpoint_that_resumes(world: World) -> None:
    out = world.root / "died"
    arguments = [*world.arguments, "--out", str(out), "--checkpoint-every", "2"]
    script = str(Path(__file__).with_name("dying_rank.py"))
    done = torchrun(script, *arguments, DIE_AT="4")
    assert done.returncode != 0
    assert not out.exists()
    header = Checkpoint(world.root / "died.ema").header()
    assert header is not None
    assert 2 <= header["step"] <= 3  # three steps were whole; the third may have been saved or not
    assert main([*arguments, "--resume"]) == 0  # one process goes on where two stopped
    same(state(world.root / "died.ema"), world.alone)


def test_more_processes_than_sequences_are_refused(world: World) -> None:
    out = str(world.root / "many")
    done = torchrun("-m", "kvfold", *world.arguments, "--out", out, "--ema-batch-tokens", "150")
    assert done.returncode != 0
    assert "a batch of 2 sequences of 100 tokens; got 150 tokens" in done.stderr


def test_alone_nothing_is_sent() -> None:
    with distributed.joined(torch.device("cpu")) as one:
        assert (one.rank, one.size) == (0, 1)
        tensor = torch.tensor([1.0, 2.0])
        one.sum([tensor])
        one.spread([tensor])
        assert tensor.tolist() == [1.0, 2.0]
        assert one.spread_json({"a": [1, None]}) == {"a": [1, None]}
    assert not torch.distributed.is_initialized()


def test_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert distributed.local_device("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [distributed.local_device(name) for name in ("cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:1", "cpu"]
