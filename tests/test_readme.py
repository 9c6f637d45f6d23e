"""What the README and the guide show is run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny import random_ids, tiny_model, tiny_tokenizer

import kvfold
from kvfold.calibrate.text import builtin_text

ROOT = Path(__file__).parent.parent


def snippets(file: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), re.DOTALL)


@pytest.mark.parametrize("file", ["README.md", "docs/guide.md"])
def test_python_snippets_run(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one namespace, in order; loading a model is left to the tiny one, and calibration is made small."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    small = {"group": 4, "codebook_size": 16, "stages": 2, "distill_steps": 2}
    calibrate = kvfold.calibrate
    monkeypatch.setattr(kvfold, "calibrate", lambda *a, **k: calibrate(*a, **k, tokens=400, settings=small, quiet=True))
    names = {
        "kvfold": kvfold,
        "model": model,
        "tok": tokenizer,
        "tokenizer": tokenizer,
        "texts": builtin_text()[:2],
        "inputs": {"input_ids": random_ids(1, 80)},
    }
    found = snippets(file)
    assert found
    for snippet in found:
        lines = [line for line in snippet.splitlines() if "from_pretrained" not in line and "import Auto" not in line]
        exec(compile("\n".join(lines), file, "exec"), names)
        names.update(cache=attached.cache if (attached := names.get("attached")) else None, input_ids=random_ids(1, 81))
    assert any("codecs" in snippet for snippet in found)


def test_links_lead_somewhere() -> None:
    for file in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", file.read_text()):
            assert (file.parent / target).exists(), f"{file.name}: {target}"
