"""`kvfold compare`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command_world import Ran, World, refused

NAMES = "rvq:stages=2:group=8:codebook_size=16:iterations=2:distill_steps=2,turboquant:bits=3,identity"


def given(world: World, *more: str) -> list[str]:
    sizes = ["--tokens", "400", "--context", "100", "--windows", "2"]
    return ["compare", world.model, "--text", world.text, "--calibration-text", world.text, "--codecs", NAMES, *sizes, *more]


def test_compare_measures_draws_and_reports(run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    out, kept = tmp_path / "out", tmp_path / "rows.json"
    ran = run(*given(world, "--out", str(out), "--json", str(kept)))
    assert ran.status == 0, ran.err
    rows = json.loads(kept.read_text())
    assert [row["codec"] for row in rows] == ["rvq", "turboquant", "identity"]
    wanted = {"perplexity", "perplexity_exact", "kl_mean", "kl_p99", "top1_agreement", "bits_per_element", "settings"}
    assert all(wanted | {"encode_tokens_per_s", "decode_tokens_per_s", "bytes_cache"} < row.keys() for row in rows)
    assert rows[0]["settings"]["stages"] == 2
    assert rows[1]["bits_per_element"] == 4.0  # 3 bits and a float16 norm of 16 channels
    assert rows[2]["kl_mean"] < 1e-6 < rows[1]["kl_mean"]
    assert all(row["encode_tokens_per_s"] > 0 and row["decode_tokens_per_s"] > 0 for row in rows)
    assert (out / "rate_distortion.png").read_bytes().startswith(b"\x89PNG")
    report = (out / "report.html").read_text()
    assert "data:image/png;base64," in report
    assert "turboquant:bits=3" in report
    assert "http" not in report
    assert len(list((out / "codecs").iterdir())) == 3
    again = run(*given(world, "--out", str(out)))
    assert "calibrating" not in again.err


def test_compare_prints_json_alone(run: Callable[..., Ran], world: World) -> None:
    assert [row["name"] for row in run(*given(world, "--json", "-")).json] == NAMES.split(",")


@pytest.mark.parametrize(
    ("codecs", "told"),
    [
        ("nonsense", "nonsense"),
        ("rvq:bits", "rvq:bits=3"),
        ("turboquant:colour=3", "colour"),
        ("rvq,turboquant:bits=x", "bits"),
    ],
)
def test_wrong_codecs_are_told_before_anything_runs(run: Callable[..., Ran], world: World, codecs: str, told: str) -> None:
    given = ["compare", world.model, "--text", world.text, "--codecs", codecs]
    ran = run(*given)
    refused(ran, told)
    assert "calibrating" not in ran.err


def test_a_folder_that_cannot_be_is_told(run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    refused(run(*given(world, "--out", str(tmp_path / "no" / "such"))), "--out")
