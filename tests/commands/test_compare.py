"""`kvfold compare`."""

from __future__ import annotations

import html
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_world import Ran, World, files, refused, save_model

from kvfold.codecs import METHODS, build_codec, resolve_settings
from kvfold.evaluate import compare as comparing

NAMES = "rvq:stages=2:group=8:codebook_size=16:iterations=2:distill_steps=2,turboquant:bits=3,identity"
BAD = "rvq-paper:group=5"  # which does not divide the head dim; told only when it is tried


def given(world: World, *more: str, codecs: str = NAMES) -> list[str]:
    sizes = ["--tokens", "400", "--context", "100", "--windows", "2"]
    return ["compare", world.model, "--text", world.text, "--calibration-text", world.text, "--codecs", codecs, *sizes, *more]


def commands(report: Path) -> list[list[str]]:
    """Two a row."""
    blocks = re.findall(r"<pre>\n(.*?)</pre>", html.unescape(report.read_text()), re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


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
    assert "://" not in report
    assert all(f"<code>{name}={value}</code>" in report for row in rows for name, value in row["settings"].items())
    assert shlex.join(["kvfold", *given(world, "--out", str(out), "--json", str(kept))]) in html.unescape(report)
    assert rows[0]["made"]["machine"]["cpu"] in html.unescape(report)
    assert len(list((out / "codecs").iterdir())) == 3
    assert ran.err.startswith(f"3 rows, 0 of them in {out / 'rows.jsonl'} already; 3 to calibrate and measure, 2 x 100 tokens")


def test_a_second_run_takes_the_rows_that_are_there(run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    out, kept = tmp_path / "out", tmp_path / "rows.json"
    first = run(*given(world, "--out", str(out), "--json", "-", codecs="turboquant,identity")).json
    (out / "mine.txt").write_text("mine")
    before = files(out)
    ran = run(*given(world, "--out", str(out), "--json", str(kept), codecs="identity,turboquant:bits=2"))  # 2 is the default
    assert ran.status == 0, ran.err
    assert "2 of them in" in ran.err
    assert ran.err.count("measured before") == 2
    assert "evaluating" not in ran.err
    assert "calibrating" not in ran.err
    rows = json.loads(kept.read_text())
    assert rows == [first[1], first[0] | {"name": "turboquant:bits=2"}]
    assert {name for name, data in files(out).items() if data != before[name]} <= {"report.html", "rate_distortion.png"}


@pytest.mark.parametrize("change", [["--windows", "1"], ["--sinks", "1"], ["--seed", "1"], ["--tokens", "300"], ["text"]])
def test_rows_of_other_arguments_are_not_taken_and_not_lost(
    run: Callable[..., Ran], world: World, tmp_path: Path, change: list[str]
) -> None:
    out = tmp_path / "out"
    assert run(*given(world, "--out", str(out), codecs="identity")).status == 0
    before = (out / "rows.jsonl").read_text()
    if change == ["text"]:
        other = tmp_path / "other.txt"
        other.write_text("w9 " + Path(world.text).read_text())
        change = ["--text", str(other)]  # --text adds to the files named before it
    ran = run(*given(world, "--out", str(out), *change, codecs="identity"))
    assert ran.status == 0, ran.err
    assert "0 of them in" in ran.err
    lines = (out / "rows.jsonl").read_text()
    assert lines.startswith(before)
    assert len(lines.splitlines()) == 2


def test_rows_of_another_dtype_are_not_taken(run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    """Though the weights are the same to the last bit: they were kept in bfloat16."""
    half = world._replace(model=save_model(tmp_path / "model", lambda model: model.bfloat16()))
    for dtype in ("float32", "bfloat16"):
        ran = run(*given(half, "--out", str(tmp_path / "out"), "--dtype", dtype, codecs="identity"))
        assert "1 rows, 0 of them" in ran.err


def test_an_interrupted_run_goes_on(
    run: Callable[..., Ran], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, evaluate = tmp_path / "out", comparing.evaluate

    def interrupted(model: Any, tokenizer: Any, codecs: Any, *args: Any, **kwargs: Any) -> Any:
        if codecs.method == "turboquant":
            raise KeyboardInterrupt
        return evaluate(model, tokenizer, codecs, *args, **kwargs)

    monkeypatch.setattr(comparing, "evaluate", interrupted)
    names = "identity,turboquant"
    ran = run(*given(world, "--out", str(out), codecs=names))
    assert (ran.status, ran.out) == (130, "")
    assert "the same command goes on" in ran.err
    assert len((out / "rows.jsonl").read_text().splitlines()) == 1
    monkeypatch.undo()
    ran = run(*given(world, "--out", str(out), codecs=names))
    assert ran.status == 0, ran.err
    assert "2 rows, 1 of them" in ran.err
    assert len((out / "rows.jsonl").read_text().splitlines()) == 2


def test_a_row_that_fails_does_not_lose_the_others(
    run: Callable[..., Ran], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, kept, evaluate = tmp_path / "out", tmp_path / "rows.json", comparing.evaluate

    def short_of_memory(model: Any, tokenizer: Any, codecs: Any, *args: Any, **kwargs: Any) -> Any:
        if codecs.method == "turboquant":
            raise MemoryError("no <memory> left\nmore of it")
        return evaluate(model, tokenizer, codecs, *args, **kwargs)

    monkeypatch.setattr(comparing, "evaluate", short_of_memory)
    names = f"{BAD},turboquant,identity"
    ran = run(*given(world, "--out", str(out), "--json", str(kept), codecs=names))
    assert ran.status == 1
    assert f"[1/3] {BAD}: failed: expected a group" in ran.err
    assert "[2/3] turboquant: failed: MemoryError: no <memory> left\n" in ran.err
    assert ran.err.endswith("kvfold: 2 of 3 rows failed; the same command tries them again\n")
    assert "Traceback" not in ran.err
    table = ran.out.splitlines()
    assert re.match(rf"{BAD} +failed +-", table[2])
    assert "turboquant failed: MemoryError: no <memory> left" in table
    rows = json.loads(kept.read_text())
    assert [row.get("error", "").partition(":")[0].partition(" ")[0] for row in rows] == ["expected", "MemoryError", ""]
    assert rows[2]["perplexity"] > 0
    report = (out / "report.html").read_text()
    assert "failed: MemoryError: no &lt;memory&gt; left" in report
    monkeypatch.undo()
    ran = run(*given(world, "--out", str(out), codecs=names))
    assert ran.status == 1
    assert "3 rows, 1 of them" in ran.err  # what failed is tried again
    assert "[2/3] turboquant: 3.000 bits" in ran.err


def test_all_rows_may_fail(run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    ran = run(*given(world, "--out", str(tmp_path), codecs=BAD))
    assert ran.status == 1
    assert f"{BAD} failed: expected a group" in ran.out
    assert "<img" not in (tmp_path / "report.html").read_text()


def test_the_report_names_commands_that_make_its_rows(
    run: Callable[..., Ran], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = run(*given(world, "--out", "out", "--sinks", "2", "--seed", "3", "--json", "-", codecs=NAMES)).json
    told = commands(tmp_path / "out" / "report.html")
    assert len(told) == 2 * len(rows)
    for row, calibrate, evaluate in zip(rows, told[::2], told[1::2], strict=True):
        assert (calibrate[:2], evaluate[:2]) == (["kvfold", "calibrate"], ["kvfold", "eval"])
        assert run(*calibrate[1:]).status == 0
        facts = run(*evaluate[1:], "--json", "-").json
        same = ("perplexity", "kl_mean", "bits_per_element", "settings", "sinks", "window", "tokens", "context", "windows")
        assert {name: facts[name] for name in same} == {name: row[name] for name in same}


def test_compare_prints_json_alone(run: Callable[..., Ran], world: World) -> None:
    assert [row["name"] for row in run(*given(world, "--json", "-")).json] == NAMES.split(",")


def test_what_is_compared_by_itself_can_be_made() -> None:
    assert len(set(comparing.CODECS)) == len(comparing.CODECS) == sum(len(row.compared) for row in METHODS.values())
    for name in comparing.CODECS:
        method, changes = comparing.parse_codec(name)
        for head_dim in (64, 128):
            settings = resolve_settings(method, changes, head_dim)
            for side in ("key", "value"):
                assert build_codec(method, side, head_dim, settings).head_dim == head_dim


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


def test_rows_of_others_are_told_before_anything_runs(run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("mine\n")
    refused(run(*given(world, "--out", str(tmp_path))), "rows.jsonl")
    assert files(tmp_path) == {"rows.jsonl": b"mine\n"}
