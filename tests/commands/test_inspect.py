"""`kvfold inspect` and `kvfold codecs`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_world import SMALL, Ran, World, save_model

import kvfold


def test_inspect_prints_a_row_a_layer_and_draws(run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    plot = tmp_path / "d.png"
    ran = run("inspect", world.codec, "--plot", str(plot))
    codecs = kvfold.load(world.codec)
    assert ran.status == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "rvq: " in ran.out
    assert "group=8" in ran.out
    for layer, (key, value) in enumerate(codecs.info["distortion"]):
        row = next(line.split() for line in ran.out.splitlines() if line.split()[:1] == [str(layer)])
        assert row[1:] == ["1.5", "2", f"{key:.4g}", f"{value:.4g}"]


def test_inspect_json_has_everything_and_nothing_else_is_printed(run: Callable[..., Ran], world: World) -> None:
    facts = run("inspect", world.codec, "--json", "-").json
    codecs = kvfold.load(world.codec)
    assert Path(world.codec, "distortion.png").is_file()
    assert (facts["method"], facts["seed"], facts["tokens"]) == ("rvq", 0, 400)
    assert facts["bytes_codebooks"] == codecs.codebook_bytes
    assert [row["key_distortion"] for row in facts["layers"]] == [pair[0] for pair in codecs.info["distortion"]]


def test_inspect_without_matplotlib_still_prints(
    run: Callable[..., Ran], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    ran = run("inspect", world.codec, "--plot", str(tmp_path / "d.png"))
    assert ran.status == 0
    assert "key distortion" in ran.out
    assert "pip install kvfold[plot]" in ran.err
    assert not list(tmp_path.iterdir())


def test_inspect_shows_layers_that_stay_exact(run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    model = save_model(tmp_path / "gemma3", family="gemma3")
    codec = str(tmp_path / "codec")
    assert run("calibrate", model, "--out", codec, "--text", world.text, "--tokens", "300", *SMALL).status == 0
    rows = run("inspect", codec, "--json", "-").json["layers"]
    assert [row["key_bits"] for row in rows] == [None, 1.5, 1.5]
    assert "exact" in run("inspect", codec).out


def test_codecs_lists_every_method_with_its_bits(run: Callable[..., Ran]) -> None:
    ran = run("codecs")
    rows = {line.split()[0]: line for line in ran.out.splitlines()[1:]}
    assert rows["rvq"].split()[1:3] == ["2.250", "2.188"]
    assert rows["rvq-paper"].split()[1:3] == ["3.000", "2.875"]
    assert "arXiv 2410.15704" in rows["rvq-paper"]
    assert rows["identity"].split()[1:3] == ["32.000", "32.000"]
