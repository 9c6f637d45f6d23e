"""`kvfold ablate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command_world import SMALL, Ran, World, refused


def test_ablate_writes_rows_table_and_picture(run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    sizes = ["--tokens", "400", "--context", "64", "--windows", "2", "--codec", "rvq-paper", *SMALL]
    texts = ["--text", world.text, "--calibration-text", world.text]
    plot, kept = tmp_path / "target.png", tmp_path / "rows.json"
    ran = run("ablate", "target", world.model, *texts, *sizes, "--json", str(kept), "--plot", str(plot))
    assert ran.status == 0, ran.err
    rows = json.loads(kept.read_text())
    assert [row["name"] for row in rows] == ["keys only", "values only", "keys and values"]
    assert all(row["name"] in ran.out and row["windows"] == 2 for row in rows)
    assert plot.read_bytes().startswith(b"\x89PNG")
    again = run("ablate", "target", world.model, *texts, *sizes, "--json", "-").json
    assert [row["perplexity"] for row in again] == [row["perplexity"] for row in rows]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["depth"], "depth"),
        (["target", "--codec", "identity"], "residual"),
        (["target", "--text", "no/such.txt"], "no/such.txt"),
        (["size", "--tokens", "400", "--context", "64"], "2048 sample vectors"),
        (["size", "--tokens", "400"], "--context from 2 to the model's 512"),
    ],
)
def test_ablate_refuses(run: Callable[..., Ran], world: World, argv: list[str], told: str) -> None:
    what, *rest = argv
    texts = [] if "--text" in rest else ["--text", world.text]
    sizes = ["--set", "group=8", "--set", "iterations=2"] if "identity" not in rest else []
    refused(run("ablate", what, world.model, *texts, "--calibration-text", world.text, *sizes, *rest), told)
