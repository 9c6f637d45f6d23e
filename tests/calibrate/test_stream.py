"""Text streams: every token once, in order, whatever the pieces; padded at the end; resumable; shared; bounded."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import tracemalloc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

import kvfold
from kvfold.calibrate import sources
from kvfold.calibrate.calibrate import token_windows
from kvfold.calibrate.sources import FileText, HubText, PlainText, parse_source, sources_of
from kvfold.calibrate.stream import Packed, TextStream, first_windows

CONTEXT = 50
WORDS = ["alpha", "be,", "gamma  delta", "x\n", "line.\nnext", "end\n\n", "tail \n \n", "émü", "\t", "日本", "a\r\nb"]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 to 64 characters, so that a short text has many."""
    monkeypatch.setattr(sources, "_LEAST", 16)
    monkeypatch.setattr(sources, "_MOST", 64)


def text_of(words: int, seed: int = 0) -> str:
    picks = torch.randint(len(WORDS), (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(WORDS[i] for i in picks)


def stream(*given: Any, context: int = CONTEXT, **more: Any) -> TextStream:
    return TextStream(tiny_tokenizer(), list(given), context, **more)


def epoch(one: TextStream) -> list[Packed]:
    """All sequences until the text begins again."""
    found = []
    for packed in one:
        if one.epoch:
            return found
        found.append(packed)
    raise AssertionError


def ids_of(text: str) -> list[int]:
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


def tokens(sequences: list[Packed]) -> list[int]:
    return [int(i) for packed in sequences for i in packed.ids[packed.mask]]


@pytest.mark.usefixtures("small_chunks")
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=60), st.integers(1, 90))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_size_of_pieces_changes_nothing(tmp_path: Path, words: list[str], piece: int) -> None:
    text = " ".join(words) + "."
    file = tmp_path / "text.txt"
    file.write_bytes(text.encode())
    chunks = list(FileText(file, piece).chunks(0))
    assert chunks == list(FileText(file).chunks(0))
    assert "".join(chunk for _, chunk in chunks) == text.replace("\r\n", "\n")
    assert chunks[-1][0] == len(text.encode())
    plain = list(PlainText(text.replace("\r\n", "\n")).chunks(0))
    if "\r" not in text:
        assert [chunk for _, chunk in plain] == [chunk for _, chunk in chunks]
    for offset, chunk in chunks[:-1]:
        assert 16 < len(chunk) <= 64
        following = list(FileText(file, piece).chunks(offset))
        assert following == chunks[chunks.index((offset, chunk)) + 1 :]


@pytest.mark.usefixtures("small_chunks")
def test_chunks_end_with_paragraphs_else_lines_else_words() -> None:
    def ends(text: str) -> list[str]:
        return [chunk for _, chunk in PlainText(text).chunks(0)]

    assert ends("a" * 20 + "\n \n\n" + "b" * 20) == ["a" * 20 + "\n \n\n", "b" * 20]
    assert ends("a\n\n" + "b" * 20 + "\n\nc") == ["a\n\n" + "b" * 20 + "\n\n", "c"]  # not before 16 characters
    assert ends("a" * 20 + "\n" + "b b" * 40)[0] == "a" * 20 + "\n"
    assert ends("aaa " * 30)[0] == "aaa " * 16
    assert ends("a" * 200) == ["a" * 64] * 3 + ["a" * 8]


@pytest.mark.usefixtures("small_chunks")
def test_every_token_comes_once_and_the_last_sequence_is_padded() -> None:
    text = text_of(150).replace("\r\n", "\n")
    one = stream(PlainText(text))
    sequences = epoch(one)
    expected = ids_of(text)
    assert len(expected) % CONTEXT
    assert tokens(sequences) == expected
    for packed in sequences:
        assert packed.ids.shape == packed.mask.shape == (CONTEXT,)
        assert packed.ids.dtype == torch.int64
        assert packed.mask.dtype == torch.bool
    assert all(bool(packed.mask.all()) for packed in sequences[:-1])
    last = sequences[-1]
    rest = len(expected) % CONTEXT
    assert last.mask.tolist() == [True] * rest + [False] * (CONTEXT - rest)
    assert last.ids[rest:].tolist() == [0] * (CONTEXT - rest)


@pytest.mark.usefixtures("small_chunks")
def test_sources_follow_each_other_and_the_text_begins_again(tmp_path: Path) -> None:
    file = tmp_path / "b.txt"
    file.write_text(text_of(40, 1).replace("\r\n", "\n"), newline="")
    one = stream(PlainText("first text. " * 9), FileText(file), PlainText("third."))
    sequences = epoch(one)
    assert tokens(sequences) == ids_of("first text. " * 9) + ids_of(file.read_text()) + ids_of("third.")
    one.seek({**one.position(), "epoch": 0, "source": 0, "offset": 0, "skip": 0, "sequence": 0})
    twice = list(islice(one, 2 * len(sequences)))
    assert one.epoch == 1
    for a, b in zip(twice, twice[len(sequences) :], strict=False):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.mask, b.mask)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("context", [7, 50, 1000])
def test_a_stream_goes_on_from_any_position(tmp_path: Path, context: int) -> None:
    file = tmp_path / "b.txt"
    file.write_bytes(text_of(60, 2).encode())

    def make() -> TextStream:
        return stream(PlainText(text_of(30)), FileText(file, 10), context=context)

    one = make()
    length = 40 if context == 7 else 12
    seen, positions = [], []
    for _ in range(length):
        positions.append(one.position())
        seen += one.batch(1)
    assert one.epoch >= 1 or context == 7
    for start, position in enumerate(positions):
        other = make()
        other.seek(position)
        assert other.position() == position
        for packed in seen[start : start + 5]:
            again = other.batch(1)[0]
            assert torch.equal(again.ids, packed.ids)
            assert torch.equal(again.mask, packed.mask)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_sequences(world: int) -> None:
    text = PlainText(text_of(100))
    alone = stream(text).batch(24)
    shared = [stream(text, rank=rank, world=world) for rank in range(world)]
    parts = [one.batch(10) + one.batch(14) for one in shared]  # 10 is no multiple of 3
    assert all(one.position() == shared[0].position() for one in shared)
    for index, packed in enumerate(alone):
        mine = parts[index % world].pop(0)
        assert torch.equal(mine.ids, packed.ids)
    assert not any(parts)


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    class Counting:
        pad_token_id = None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [len(text)]}

    file = tmp_path / "large.txt"
    with file.open("w") as out:
        for number in range(4000):
            out.write(f"{number} " + "word " * 1000 + "\n\n")
    assert file.stat().st_size > 20_000_000
    one = TextStream(Counting(), [FileText(file, 1 << 16)], 10)
    tracemalloc.start()
    read = sum(int(packed.ids[packed.mask].sum()) for packed in epoch(one))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert read == file.stat().st_size
    assert peak < 1_500_000  # a piece, a chunk, and their copies; the text is 20 MB


def test_first_windows_are_those_of_the_text_as_a_whole(tmp_path: Path) -> None:
    text = "some words, " * 30
    for wanted in (360, 100, 55, 51, 50, 2):
        mine = first_windows(tiny_tokenizer(), [PlainText(text)], wanted, CONTEXT)
        whole = token_windows(tiny_tokenizer(), text, wanted, CONTEXT)
        assert [w.tolist() for w in mine] == [w.tolist() for w in whole]
    file = tmp_path / "a.txt"
    file.write_text(text)
    streamed = token_windows(tiny_tokenizer(), [file], 100, CONTEXT)
    assert [w.tolist() for w in streamed] == [w.tolist() for w in token_windows(tiny_tokenizer(), text, 100, CONTEXT)]


class _Rows:
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def skip(self, count: int) -> _Rows:
        return _Rows(self.rows[count:])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in for the package `datasets`, with one data set; returns what it was asked for."""
    asked: list[Any] = []

    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> _Rows:
        asked.append((name, config, split, streaming))
        if name != "some/set":
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        return _Rows([{"id": i, "body": f"row {i} " + text_of(3, i), "other": "x"} for i in range(40)])

    module = ModuleType("datasets")
    module.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


@pytest.mark.usefixtures("small_chunks")
def test_a_data_set_of_the_hub_is_streamed_and_resumed(hub: list[Any]) -> None:
    source = parse_source("hf:some/set@en:valid:body")
    assert source == HubText("some/set@en", "valid", "body")
    one = stream(source)
    sequences = epoch(one)
    assert hub[0] == ("some/set", "en", "valid", True)
    expected = "".join(f"row {i} {text_of(3, i)}".strip() + "\n\n" for i in range(40))
    assert tokens(sequences) == ids_of(expected)
    one = stream(source)
    one.batch(5)
    other = stream(source)
    other.seek(one.position())
    assert torch.equal(other.batch(1)[0].ids, one.batch(1)[0].ids)


def test_hub_errors_are_told(hub: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(kvfold.InputError, match="text columns are body, other"):
        stream(HubText("some/set")).batch(1)
    with pytest.raises(kvfold.InputError, match="doesn't exist on the Hub"):
        stream(HubText("no/such")).batch(1)
    for bad in ("hf:", "hf::train", "hf:a:b:c:d"):
        with pytest.raises(kvfold.InputError, match="hf:NAME"):
            parse_source(bad)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "datasets" else find(name, *rest))
    with pytest.raises(kvfold.InputError, match="pip install"):
        HubText("some/set")


def test_what_texts_may_be(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("text")
    assert sources_of("one") == [PlainText("one")]
    assert sources_of(["one", " ", "two"]) == [PlainText("one\n\ntwo")]
    assert sources_of(file) == [FileText(file)] == [parse_source(str(file))]
    assert sources_of(["one", file, FileText(file)]) == [PlainText("one"), FileText(file), FileText(file)]


def test_identity_tells_texts_apart(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.txt", "b.txt")]
    for file in files:
        file.write_text(file.name * len(file.name))
    longer = tmp_path / "sub" / "a.txt"
    longer.parent.mkdir()
    longer.write_text("more than before " * 3)
    given = [PlainText("a"), PlainText("b"), *map(FileText, (*files, longer))]
    assert len({source.identity() for source in given}) == len(given)
    assert FileText(files[0]).identity() == FileText(files[0], 3).identity()


def test_bad_text_is_told(tmp_path: Path) -> None:
    with pytest.raises(kvfold.InputError, match="nothing at"):
        FileText(tmp_path / "none.txt")
    with pytest.raises(kvfold.InputError, match="text file"):
        FileText(tmp_path)
    binary = tmp_path / "binary"
    binary.write_bytes(b"good text " * 20 + b"\xff\xfe")
    with pytest.raises(kvfold.InputError, match="UTF-8"):
        stream(FileText(binary, 16)).batch(100)
    cut = tmp_path / "cut"
    cut.write_bytes("é".encode()[:1])
    with pytest.raises(kvfold.InputError, match="UTF-8"):
        stream(FileText(cut)).batch(1)
    empty = tmp_path / "empty"
    empty.write_text("")
    with pytest.raises(kvfold.InputError, match="calibration text"):
        stream(FileText(empty)).batch(1)
    for nothing in ("", [], ["  "]):
        with pytest.raises(kvfold.InputError, match="calibration text"):
            sources_of(nothing)
    with pytest.raises(kvfold.InputError, match="at least 2 tokens"):
        first_windows(tiny_tokenizer(), [PlainText("x")], 10, 5)


@pytest.mark.parametrize(
    "change", [{"source": 2}, {"skip": 10**6}, {"offset": -1}, {"epoch": "0"}, {"sequence": None}, {"offset": 10**6, "skip": 1}]
)
def test_positions_that_do_not_exist_are_told(change: dict[str, Any]) -> None:
    one = stream(PlainText(text_of(50)))
    with pytest.raises(kvfold.InputError, match="a position in this text"):
        one.seek({**one.position(), **change})
