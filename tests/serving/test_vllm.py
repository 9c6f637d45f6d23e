"""kvfold inside vLLM, on the real model: `make test-vllm`, in an environment of its own. Engines run in other processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import kvfold
from kvfold.calibrate.text import builtin_text
from kvfold.integration.models import load_model, model_folder

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
pytestmark = pytest.mark.vllm
NEW = 20


def answer(codec: Path | None, prompts: list[list[int]], env: dict[str, str] | None = None, **request: Any) -> dict[str, Any]:
    engine = {"model": model_folder("smollm2"), "dtype": "float32", "max_model_len": 1024, "enforce_eager": True}
    engine |= request.pop("engine", {})
    if codec is not None:
        engine["additional_config"] = {"kvfold": {"codec": str(codec)}}
    asked = {"engine": engine, "prompts": prompts, "tokens": NEW, **request}
    told = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", **os.environ, **(env or {})}
    command = [sys.executable, str(Path(__file__).with_name("engine.py"))]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, env=told)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 stages of 256, own books per head, scales in a byte; not trained, to be quick."""
    model, tokenizer = load_model("smollm2")
    settings = {"distill_steps": 0, "max_vectors": 8192, "iterations": 4}
    folder = tmp_path_factory.mktemp("codec") / "rvq"
    kvfold.calibrate(model, tokenizer, builtin_text(), settings=settings, tokens=8192, quiet=True).save(folder)
    return folder


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """50 of 8 to 204 tokens."""
    _, tokenizer = load_model("smollm2")
    ids = tokenizer("\n\n".join(builtin_text())[:100_000], verbose=False)["input_ids"]
    return [ids[200 * i : 200 * i + 8 + 4 * i] for i in range(50)]


@pytest.fixture(scope="module")
def served(codec: Path, prompts: list[list[int]]) -> dict[str, Any]:
    return answer(codec, prompts)


def test_greedy_text_is_that_of_transformers(codec: Path, prompts: list[list[int]], served: dict[str, Any]) -> None:
    """Sums in another order may turn a near-tie, so 2 of 50 may differ."""
    model, _ = load_model("smollm2")
    same = 0
    with kvfold.attach(model, kvfold.load(codec), sinks=0, window=0):
        for ids, got in zip(prompts, served["tokens"][0], strict=True):
            inputs = torch.tensor([ids])
            how = {"do_sample": False, "repetition_penalty": 1.0, "min_new_tokens": NEW, "max_new_tokens": NEW}
            out = model.generate(inputs, attention_mask=torch.ones_like(inputs), eos_token_id=None, **how)
            same += out[0, len(ids) :].tolist() == got
    assert same >= 48, same


def test_pages_hold_six_times_the_tokens_of_bfloat16(prompts: list[list[int]], served: dict[str, Any]) -> None:
    plain = answer(None, prompts[:1], engine={"dtype": "bfloat16"})
    assert served["capacity"] >= 6 * plain["capacity"]


def test_chunks_prefixes_and_preemption_change_nothing(codec: Path, prompts: list[list[int]], served: dict[str, Any]) -> None:
    """Prompts in chunks of 64 tokens; room for a few rows only, so that others are put off and done again; and, in the second
    round, prefixes that are in the cache already."""
    tight = {"max_num_batched_tokens": 64, "max_num_seqs": 16, "num_gpu_blocks_override": 12, "block_size": 32}
    got = answer(codec, prompts[:24], rounds=2, engine={**tight, "max_model_len": 256, "enable_prefix_caching": True})
    for tokens in got["tokens"]:
        same = sum(a == b for a, b in zip(tokens, served["tokens"][0], strict=False))
        assert same >= 23, same


def test_three_processes_share_the_heads(codec: Path, prompts: list[list[int]], served: dict[str, Any]) -> None:
    got = answer(codec, prompts[:8], engine={"tensor_parallel_size": 3})
    assert sum(a == b for a, b in zip(got["tokens"][0], served["tokens"][0], strict=False)) >= 7


def test_the_environment_names_a_codec_too(codec: Path, prompts: list[list[int]], served: dict[str, Any]) -> None:
    got = answer(None, prompts[:2], env={"KVFOLD_CODEC": str(codec)})
    assert got["capacity"] == served["capacity"]
    assert got["tokens"][0] == served["tokens"][0][:2]


def test_a_codec_of_another_model_is_refused(tmp_path: Path, prompts: list[list[int]]) -> None:
    from small import SPEC, codec_set

    folder = tmp_path / "other"
    codec_set("rvq").save(folder)
    with pytest.raises(AssertionError, match=f"the model this codec was calibrated for .a {SPEC.model_type} of 3 layers"):
        answer(folder, prompts[:1], env={"VLLM_LOGGING_LEVEL": "ERROR"})
