"""`kvfold eval`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_world import Ran, World
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvfold
from kvfold.evaluate import evaluate


def test_eval_json_is_what_evaluate_measures(run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    sizes = {"context": 100, "windows": 3, "sinks": 2, "window": 8}
    options = [part for name, number in sizes.items() for part in (f"--{name}", str(number))]
    given = ["eval", world.model, "--codec", world.codec, "--text", world.text, *options]
    facts = run(*given, "--json", "-").json
    model, tokenizer = AutoModelForCausalLM.from_pretrained(world.model), AutoTokenizer.from_pretrained(world.model)
    wanted = evaluate(model, tokenizer, kvfold.load(world.codec), Path(world.text).read_text(), **sizes, quiet=True).to_json()
    for name in ("perplexity", "perplexity_exact", "kl_mean", "kl_p99", "top1_agreement"):
        assert facts[name] == pytest.approx(wanted[name], rel=1e-5)
    for name in ("bits_per_element", "bits_per_element_with_codebooks", "bytes_cache", "bytes_bf16", "tokens", *sizes):
        assert facts[name] == wanted[name]
    assert facts["seconds"] > 0
    assert facts["kl_mean"] > 1e-4

    ran = run(*given, "--json", str(tmp_path / "out.json"), "--record", str(tmp_path))
    assert ran.status == 0
    assert f"{facts['perplexity']:.4f}" in ran.out
    assert json.loads((tmp_path / "out.json").read_text())["kl_mean"] == facts["kl_mean"]
    recorded = json.loads((tmp_path / "eval.jsonl").read_text())
    assert recorded["kl_mean"] == facts["kl_mean"]
    assert recorded["config"]["context"] == 100
    assert recorded["machine"]["torch"] == torch.__version__


def test_eval_defaults_to_the_papers_protocol(run: Callable[..., Ran], world: World) -> None:
    facts = run("eval", world.model, "--codec", world.codec, "--text", world.text, "--context", "60", "--json", "-").json
    assert (facts["sinks"], facts["window"], facts["windows"], facts["tokens"]) == (0, 0, 8, 8 * 59)
    assert facts["bits_per_element"] == kvfold.load(world.codec).bits_per_element


def test_eval_with_another_beam(run: Callable[..., Ran], world: World) -> None:
    given = ["eval", world.model, "--codec", world.codec, "--text", world.text, "--context", "100", "--json", "-"]
    greedy, wide = run(*given).json, run(*given, "--set", "beam=8").json
    assert (greedy["settings"]["beam"], wide["settings"]["beam"]) == (4, 8)
    assert greedy["kl_mean"] != wide["kl_mean"]
