"""A tiny model, its codec and text on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from finetuned import TEXT
from tiny import tiny_codecs, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finetune")
    tiny_model("llama").save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    tiny_codecs("llama", "rvq-paper").save(root / "codec")
    (root / "text.txt").write_text(TEXT)
    return root
