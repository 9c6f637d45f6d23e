"""The needle test: what is hidden where, what counts as found, and that both caches are asked the same."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_codecs, tiny_model, tiny_tokenizer

import kvfold
from kvfold.bench.plot import plot_needle
from kvfold.cli import main
from kvfold.evaluate import needle
from kvfold.evaluate.needle import NeedleResult, _prompts

LINES = "".join(f"line {i:02d} of it all\n" for i in range(60))
FACT = re.compile(r"The magic number of (\w+) is (\d{5})\.")


def texts_of(contexts: list[int], depths: list[float], seed: int = 0) -> dict[tuple[int, float], tuple[str, str]]:
    """(context, depth) -> the prompt's text and its number."""
    made = _prompts(tiny_tokenizer(), [LINES], contexts, depths, seed)
    return {(context, depth): (tiny_tokenizer().decode(ids[0]), number) for context, depth, number, ids in made}


def run(codecs: dict[str, kvfold.CodecSet], **how: Any) -> NeedleResult:
    how = {"contexts": (300,), "depths": (0, 100), **how}
    return needle(tiny_model("llama"), tiny_tokenizer(), codecs, [LINES], quiet=True, **how)


def test_prompts_are_as_long_as_asked_and_no_longer() -> None:
    for (context, _), (text, _) in texts_of([260, 480], [0, 33, 100]).items():
        assert context - 3 < len(text) <= context


def test_the_fact_lies_at_its_depth_once_and_between_lines() -> None:
    for (_, depth), (text, number) in texts_of([480], [0, 25, 50, 75, 100]).items():
        (found,) = FACT.finditer(text)
        assert found[2] == number
        filler = [match.start() for match in re.finditer(r"line \d\d", text)]
        before = sum(start < found.start() for start in filler) / len(filler)
        assert before == pytest.approx(depth / 100, abs=1.5 / len(filler))
        assert depth == 100 or text[: found.start()].endswith(("of it all\n\n", "in it.\n\n\n"))
        assert f"the magic number of {found[1]}?" in text[found.end() :]


def test_facts_differ_by_prompt_and_seed() -> None:
    first, again, other = (texts_of([300], [0, 50, 100], seed) for seed in (0, 0, 1))
    assert first == again
    assert len({number for _, number in [*first.values(), *other.values()]}) == 6


def test_a_chat_template_is_used_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = texts_of([300], [0])[300, 0][0]
    assert bare.endswith("\nAnswer:")
    monkeypatch.setattr(tiny_tokenizer(), "chat_template", "[user {{ messages[0]['content'] }}]=")
    chat = texts_of([300], [0])[300, 0][0]
    assert (chat[:6], chat[-2:]) == ("[user ", "]=")


def test_identity_answers_as_the_exact_cache_does() -> None:
    result = run({"same": tiny_codecs("llama", "identity"), "rvq": tiny_codecs("llama", stages=1, codebook_size=2)})
    answers = {name: [a.answer for a in result.answers if a.cache == name] for name in result.found}
    assert answers["exact"] == answers["same"]
    assert answers["exact"] != answers["rvq"]
    bits = {a.cache: a.bits_per_element for a in result.answers}
    assert bits["exact"] is None
    assert bits["rvq"] < bits["same"] == 32


def test_a_number_in_the_answer_is_found_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = [number for _, _, number, _ in _prompts(tiny_tokenizer(), [LINES], [400, 300], [0, 100], 0)]
    exact = [f"It is {numbers[0][:2]},{numbers[0][2:]}.", numbers[1], "12", ""]
    said = iter([text for one in exact for text in (one, "no")])
    monkeypatch.setattr(sys.modules[NeedleResult.__module__], "_answer", lambda *args: next(said))
    result = run({"rvq": tiny_codecs("llama")}, contexts=(300, 400, 300))
    assert result.found == {"exact": 0.5, "rvq": 0.0}
    assert (result.contexts, result.depths) == ([300, 400], [0, 100])
    assert result.grid("exact") == [[0, 1], [0, 1]]
    assert result.grid("rvq") == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"contexts": (500,)}, "at most 488"),
        ({"contexts": (100,)}, "room for the question"),
        ({"contexts": ()}, "one context and one depth"),
        ({"depths": (0, 101)}, "0 to 100"),
        ({"depths": (-1,)}, "0 to 100"),
        ({"codecs": {"exact": tiny_codecs("llama")}}, "exact"),
        ({"codecs": {"rvq": tiny_codecs("qwen3")}}, "model type"),
        ({"texts": ["short"]}, "longer text"),
        ({"sinks": -1}, "sinks"),
    ],
)
def test_bad_input_is_told(how: dict[str, Any], told: str) -> None:
    given = {"codecs": {"rvq": tiny_codecs("llama")}, "texts": [LINES], "contexts": (300,), "depths": (0,), **how}
    with pytest.raises(kvfold.InputError, match=told):
        needle(tiny_model("llama"), tiny_tokenizer(), quiet=True, **given)


def test_the_picture_has_a_panel_a_cache(tmp_path: Path) -> None:
    one, two = tmp_path / "1.png", tmp_path / "2.png"
    for file, panels in ((one, {"exact": [[1, 0]]}), (two, {"exact": [[1, 0]], "rvq": [[0, 0]]})):
        plot_needle(panels, [1024, 2048], [50], file)
    sizes = [int.from_bytes(file.read_bytes()[16:20]) for file in (one, two)]  # width, of a PNG's header
    assert sizes[1] > 1.5 * sizes[0]


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text, picture = tmp_path / "model", tmp_path / "text", tmp_path / "needle.png"
    tiny_model("llama").save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    text.write_text(LINES)
    for name in ("a", "b"):
        tiny_codecs("llama").save(tmp_path / name)
    given = ["needle", str(model), "--text", str(text), "--contexts", "300,350", "--depths", "0,50"]
    codecs = ["--codec", str(tmp_path / "a"), str(tmp_path / "b")]
    threads = torch.get_num_threads()
    assert main([*given, *codecs, "--plot", str(picture), "--json", "-", "--record", str(tmp_path)]) == 0
    ran = capsys.readouterr()
    facts = json.loads(ran.out)
    assert len(facts["answers"]) == 2 * 2 * 3
    assert list(facts["found"]) == ["exact", "a", "b"]
    assert (facts["sinks"], facts["window"]) == (4, 64)
    assert "4 prompts of 1,3" in ran.err.replace("1,2", "1,3")  # a little less than 1,300 tokens
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "needle.jsonl").read_text())["found"] == facts["found"]
    assert main([*given, *codecs]) == 0
    assert re.search(r"^b +50 +- +-$", capsys.readouterr().out, re.MULTILINE)
    assert torch.get_num_threads() == threads
    for wrong in (
        [*given, "--codec", str(tmp_path / "a"), str(tmp_path / "a")],
        [*given, *codecs, "--contexts", "0"],
        [*given, *codecs, "--depths", "x"],
        [*given, *codecs, "--plot", "no/such/folder.png"],
        given,
    ):
        assert main(wrong) == 2
        ran = capsys.readouterr()
        assert ran.out == ""
        assert ran.err.startswith("kvfold: error: expected ")
