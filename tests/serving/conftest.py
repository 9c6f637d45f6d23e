"""A codec of the real model and prompts for it."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvfold
from kvfold.calibrate.text import builtin_text
from kvfold.integration.models import load_model


@pytest.fixture(scope="session")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 stages of 256, own books per head, scales in a byte; not trained, to be quick."""
    model, tokenizer = load_model("smollm2")
    settings = {"distill_steps": 0, "max_vectors": 8192, "iterations": 4}
    folder = tmp_path_factory.mktemp("codec") / "rvq"
    kvfold.calibrate(model, tokenizer, builtin_text(), settings=settings, tokens=8192, quiet=True).save(folder)
    return folder


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """50 of 8 to 204 tokens."""
    _, tokenizer = load_model("smollm2")
    ids = tokenizer("\n\n".join(builtin_text())[:100_000], verbose=False)["input_ids"]
    return [ids[200 * i : 200 * i + 8 + 4 * i] for i in range(50)]
