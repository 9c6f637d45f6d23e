"""`kvfold budget`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from command_world import Ran, World, refused


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfold.evaluate.budget.TAIL", 32)


def test_the_command_prints_a_table_and_draws(run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    plot = tmp_path / "budget.png"
    given = ["budget", world.model, "--codec", world.codec, "--text", world.text, "--contexts", "100,150", "--windows", "1"]
    ran = run(*given, "--max-bytes", "90000", "--plot", str(plot))
    assert ran.status == 0, ran.err
    assert "KL, limited" in ran.out
    assert plot.read_bytes().startswith(b"\x89PNG")
    facts = run(*given, "--max-bytes", "20000", "--json", "-").json
    assert [row["context"] for row in facts] == [100, 150]
    assert facts[1]["kl_limited"] is None
    assert "does not fit" in run(*given, "--max-bytes", "20000").out
    refused(run("budget", world.model, "--codec", world.codec, "--text", world.text), "--max-bytes")
