"""The file of finished rows: taken up again, never damaged, others' lines left in it."""

from __future__ import annotations

import json
import os
from dataclasses import fields, replace
from pathlib import Path

import pytest

from kvfold.errors import InputError
from kvfold.evaluate.evaluate import Evaluation
from kvfold.evaluate.rows import Compared, KeptRows

EVALUATION = Evaluation(**{field.name: number + 0.1 for number, field in enumerate(fields(Evaluation), 1)})
ROW = Compared("a:bits=2", "a", {"bits": 2, "rope": "pre", "power": 0.1}, 1 / 3, 2e9, EVALUATION, {"git": None})


def test_a_row_is_found_again_by_run_codec_and_settings(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    KeptRows(file, "run").add(ROW)
    again = KeptRows(file, "run")
    assert again.find("a", {"power": 0.1, "rope": "pre", "bits": 2}) == ROW  # to the last digit, in any order
    assert again.find("a", {**ROW.settings, "bits": 3}) is None
    assert again.find("b", ROW.settings) is None
    assert KeptRows(file, "other").find("a", ROW.settings) is None


def test_without_a_file_rows_are_found_in_memory() -> None:
    rows = KeptRows(None, "run")
    rows.add(ROW)
    assert rows.find("a", ROW.settings) == ROW


def test_lines_of_other_runs_and_of_older_kvfolds_stay_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    old = '{"run": "run",  "codec": "a", "settings": {"bits": 2, "rope": "pre", "power": 0.1}}\n'
    file.write_text(old)
    first, second = KeptRows(file, "run"), KeptRows(file, "other")  # at the same time
    assert first.find("a", ROW.settings) is None  # measured less than is measured now
    first.add(ROW)
    second.add(replace(ROW, codec="b"))
    assert file.read_text().startswith(old)
    assert [json.loads(line)["run"] for line in file.read_text().splitlines()] == ["run", "run", "other"]
    assert KeptRows(file, "run").find("a", ROW.settings) == ROW  # the newer of two


def test_a_write_that_fails_leaves_the_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    rows = KeptRows(file, "run")
    rows.add(ROW)
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        rows.add(replace(ROW, codec="b"))
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("text", ["a list of mine\n", "[1]\n", '{"name": "mine"}\n', '{"run": "x", "codec": "a"', "\n", "\xff"])
def test_a_file_of_others_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"rows of `kvfold compare`.*rows\.jsonl.*move the file away"):
        KeptRows(file, "run")
    assert file.read_bytes() == text.encode("latin-1")
