"""Engines of vLLM in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import kvfold
from kvfold.integration.models import load_model, model_folder

NEW = 20


def answer(codec: Path | None, prompts: list[list[int]], env: dict[str, str] | None = None, **request: Any) -> dict[str, Any]:
    """What `serving/engine.py` says of SmolLM2 with `codec`; `engine=` are arguments of vLLM's `LLM`."""
    engine = {"model": model_folder("smollm2"), "dtype": "float32", "max_model_len": 1024, "enforce_eager": True}
    engine |= request.pop("engine", {})
    if codec is not None:
        engine["additional_config"] = {"kvfold": {"codec": str(codec)}}
    asked = {"engine": engine, "prompts": prompts, "tokens": NEW, **request}
    told = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", **os.environ, **(env or {})}
    command = [sys.executable, str(Path(__file__).parent / "serving" / "engine.py")]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, env=told)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"log": done.stderr}


def agreement(codec: Path, prompts: list[list[int]], served: dict[str, Any]) -> float:
    """Of what vLLM said, read by transformers through `CompressedCache(sinks=0, window=0)`: the share of tokens that are the
    likeliest there too."""
    model, _ = load_model("smollm2")
    likeliest = 0
    with torch.no_grad(), kvfold.attach(model, kvfold.load(codec), sinks=0, window=0):
        for ids, tokens in zip(prompts, served["tokens"][0], strict=False):
            logits = model(input_ids=torch.tensor([ids + tokens[:-1]]), use_cache=True).logits[0, len(ids) - 1 :]
            likeliest += int((logits.argmax(-1) == torch.tensor(tokens)).sum())
    return likeliest / (len(served["tokens"][0]) * NEW)
