"""Engines of vLLM in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from kvfold.integration.models import model_folder

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
