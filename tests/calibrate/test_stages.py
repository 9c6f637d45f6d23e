"""A calibration with training that is interrupted goes on where it stood (`kvfold/calibrate/stages.py`)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model, tiny_tokenizer

import kvfold
from kvfold.calibrate.text import builtin_text

SETTINGS = {"group": 4, "codebook_size": 16, "stages": 3, "iterations": 2, "distill_steps": 7}
DISTILL = "kvfold.calibrate.distill"


def calibrated(folder: Path | None, seed: int = 0, quiet: bool = True) -> kvfold.CodecSet:
    given: dict[str, Any] = {"tokens": 600, "context": 100, "settings": SETTINGS, "checkpoint": folder, "quiet": quiet}
    return kvfold.calibrate(tiny_model("llama"), tiny_tokenizer(), builtin_text(), "rvq", seed, **given)


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Training is interrupted after that many passages are drawn; None: it is not."""
    distill = sys.modules[DISTILL]
    monkeypatch.setattr(distill, "EVERY", 2)
    passage, left = distill._passage, [None]

    def draw(*given: Any) -> Any:
        if left[0] is not None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        return passage(*given)

    monkeypatch.setattr(distill, "_passage", draw)
    return lambda count: left.__setitem__(0, count)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 6])
def test_an_interrupted_run_gives_the_bytes_of_one_that_was_not(
    count: int, stop_after: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    want, folder = calibrated(None), tmp_path / "c"
    stop_after(count)
    with pytest.raises(KeyboardInterrupt):
        calibrated(folder)
    assert folder.is_dir()
    stop_after(None)
    monkeypatch.setattr(sys.modules["kvfold.calibrate.calibrate"], "_fit_codecs", None)  # nothing is fitted again
    got = calibrated(folder, quiet=False)
    assert f"{count // 2 * 2} of 7 steps are done" in capsys.readouterr().err
    assert got.fingerprint() == want.fingerprint()
    assert got.info["distill"] == want.info["distill"]
    assert not folder.exists()


def test_another_calibration_starts_anew(stop_after: Any, tmp_path: Path) -> None:
    stop_after(3)
    with pytest.raises(KeyboardInterrupt):
        calibrated(tmp_path / "c")
    stop_after(None)
    assert calibrated(tmp_path / "c", seed=1).fingerprint() == calibrated(None, seed=1).fingerprint()


def test_damage_is_told(stop_after: Any, tmp_path: Path) -> None:
    stop_after(3)
    with pytest.raises(KeyboardInterrupt):
        calibrated(tmp_path / "c")
    stop_after(None)
    (file,) = (tmp_path / "c").glob("training-*.safetensors")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(kvfold.InputError, match="checkpoint"):
        calibrated(tmp_path / "c")


def test_a_folder_that_cannot_be_is_told(tmp_path: Path) -> None:
    with pytest.raises(kvfold.InputError, match="folder for checkpoints"):
        calibrated(tmp_path / "no" / "such")
