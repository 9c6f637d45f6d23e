"""A record of runs: one JSON line each, with date, git ref and machine, so that a table in the README can be traced."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from kvfold.files import require_file_target

RESULTS = "benchmarks/results"


def record(where: str | Path, kind: str, payload: dict[str, Any]) -> Path:
    """Append `payload` with date, git ref and machine to the file `where`, or to `<kind>.jsonl` in the folder `where`.

    Raises:
        InputError: the folder does not exist.
    """
    file = record_file(where, kind)
    line = {"kind": kind, **circumstances(), **payload}
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(line) + "\n")
    return file


def record_file(where: str | Path, kind: str) -> Path:
    """The file that `record` appends to; InputError if its folder does not exist (asked before long work)."""
    path = Path(where)
    file = path if path.suffix == ".jsonl" else path / f"{kind}.jsonl"
    require_file_target(file)
    return file


def circumstances() -> dict[str, Any]:
    """Date, git ref and machine: what says under which conditions a number was measured."""
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "git": _git_ref(), "machine": machine()}


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _git_ref() -> str | None:
    """Commit of the working copy that kvfold runs from, "-dirty" if it was changed; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:  # no git
        return None
    return done.stdout.strip() or None
