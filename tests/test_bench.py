"""The record of runs, and the memory figures of a measuring process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvfold.bench.generate import dense_bytes
from kvfold.bench.plot import plot_distortion, plot_rates
from kvfold.bench.record import record, record_file
from kvfold.compat import DynamicCache
from kvfold.errors import InputError


def test_records_are_appended_a_line_each(tmp_path: Path) -> None:
    for number in (1, 2):
        assert record(tmp_path, "speed", {"number": number}) == tmp_path / "speed.jsonl"
    assert record(tmp_path / "mine.jsonl", "speed", {"number": 3}) == tmp_path / "mine.jsonl"
    lines = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == [1, 2]
    first = lines[0]
    assert first["kind"] == "speed"
    assert first["date"].endswith("+00:00")
    assert first["machine"]["cores"] >= 1
    assert first["machine"]["torch"] == torch.__version__
    assert "git" in first


def test_a_record_needs_its_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="an existing folder"):
        record_file(tmp_path / "none", "speed")


def test_peak_memory_is_the_processes_own() -> None:
    """`ru_maxrss` of a new process starts at its parent's peak; ours must not."""
    ballast = torch.ones(200 << 18)  # 200 MiB
    code = "from kvfold.bench.generate import _rss; print(_rss('VmRSS'), _rss('VmHWM'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    now, peak = map(int, done.stdout.split())
    assert 10 << 20 < now <= peak < now + ballast.nbytes // 2


def test_dense_bytes_counts_keys_and_values() -> None:
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8), 0)
    cache.update(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8), 1)
    assert dense_bytes(cache) == 2 * 2 * 2 * 5 * 8 * 4


def test_a_distortion_of_zero_can_be_drawn(tmp_path: Path) -> None:
    plot_distortion([0, 1], [0.0, 0.0], [0.0, 0.0], "identity", tmp_path / "d.png")
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")


def test_rates_of_any_size_can_be_drawn(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Of more methods than there are colours, exact ones, broken ones, ones hardly compressed."""
    nan, inf = float("nan"), float("inf")
    lines = {f"method {i}": [(1.25, 1e6, 9.0), (4.0, 1.0 + 10.0**-i, 10.0**-i)] for i in range(20)}
    lines |= {"broken": [(2.0, nan, nan), (3.0, inf, inf)], "identity": [(32.0, 1 - 1e-9, 0.0)]}
    plot_rates(lines, "rates", tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert not [str(warning.message) for warning in recwarn]
