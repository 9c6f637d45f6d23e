"""`kvfold calibrate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from command_world import SMALL, Ran, World, files, words
from tiny import random_ids

import kvfold


def test_calibrate_writes_a_folder_and_says_what_it_is(run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    first, second, other = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    given = ["calibrate", world.model, "--text", world.text, "--tokens", "400", *SMALL]
    ran = run(*given, "--out", str(first))
    codecs = kvfold.load(first)
    assert ran.status == 0
    assert ran.out.count("\n") == 1
    for part in (str(first), f"{codecs.bits_per_element:.3f} bits", f"{codecs.codebook_bytes:,} bytes", "distortion"):
        assert part in ran.out
    assert "calibrating rvq on 400 tokens" in ran.err
    assert codecs.settings["stages"] == 2
    assert codecs.info["tokens"] == 400
    assert run(*given, "--out", str(second)).status == 0
    assert files(first) == files(second)
    assert run(*given, "--out", str(other), "--seed", "1").status == 0
    assert files(first)["codecs.safetensors"] != files(other)["codecs.safetensors"]


def test_calibrate_joins_several_texts(run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(words(random_ids(1, 150, ord(name))))
    texts = ["--text", str(tmp_path / "a"), str(tmp_path / "b")]
    assert run("calibrate", world.model, "--out", str(tmp_path / "codec"), *texts, *SMALL).status == 0
    assert kvfold.load(tmp_path / "codec").info["tokens"] == 300


def test_calibrate_without_text_lets_the_model_write(run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    ran = run("calibrate", world.model, "--out", str(tmp_path / "codec"), "--tokens", "200", *SMALL)
    assert ran.status == 0
    assert kvfold.load(tmp_path / "codec").info["text"] == "own samples"
