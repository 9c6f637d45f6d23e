"""Prefixes on disk (`kvfold/serving/prefixes.py`)."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfold.errors import InputError
from kvfold.serving.prefixes import PrefixStore, model_identity, page_keys

SHAPE = (3, 2, 4, 8)
BYTES = 3 * 2 * 4 * 8


def page(seed: int = 0) -> torch.Tensor:
    return torch.randint(256, SHAPE, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def names(count: int, identity: str = "a") -> list[str]:
    return page_keys(identity, range(4 * count), 4)


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


@given(st.lists(st.integers(0, 200_000), max_size=40), st.lists(st.integers(0, 200_000), max_size=40), st.integers(1, 9))
def test_names_are_equal_as_far_as_tokens_are(first: list[int], second: list[int], size: int) -> None:
    common = list(takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
    keys, others = page_keys("m", first, size), page_keys("m", second, size)
    assert len(keys) == len(first) // size
    same = len(common) // size
    assert keys[:same] == others[:same]
    assert not set(keys[same:]) & set(others)
    assert len(set(keys)) == len(keys)
    assert not set(keys) & set(page_keys("another", first, size))


def test_what_is_saved_is_loaded_by_another_store(tmp_path: Path) -> None:
    (key,) = names(1)
    store = PrefixStore(tmp_path / "new" / "folder", SHAPE)
    assert not store.has(key)
    assert store.load(key) is None
    store.save(key, page())
    store.save(key, page(1))  # the same name means the same codes: the first stays
    for other in (store, PrefixStore(tmp_path / "new" / "folder", SHAPE)):
        assert other.has(key)
        found = other.load(key)
        assert found is not None
        assert torch.equal(found, page())
    assert not PrefixStore(tmp_path / "new" / "folder", SHAPE, part="1of2").has(key)
    store.remove(key)
    assert not store.has(key)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def turn(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def foreign(file: Path) -> None:
    file.write_text("something else")


def renamed(file: Path) -> None:
    """A sound file of another prefix, under this one's name."""
    other = file.parent.parent / "other"
    PrefixStore(other, SHAPE).save(names(1, "b")[0], page())
    os.replace(kept(other)[0], file)


@pytest.mark.parametrize("harm", [cut, turn, foreign, renamed])
def test_what_is_not_sound_is_no_hit_and_is_written_anew(harm, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = names(2)
    store = PrefixStore(tmp_path, SHAPE)
    for key in (first, second):
        store.save(key, page())
    for file in kept(tmp_path):
        harm(file)
    fresh = PrefixStore(tmp_path, SHAPE)
    with caplog.at_level(logging.WARNING, logger="kvfold"):
        assert not fresh.has(first)
        assert fresh.load(second) is None
    assert len(caplog.records) == 1
    assert store.load(first) is None  # it had found the file sound before
    fresh.save(first, page())
    assert fresh.has(first)
    found = fresh.load(first)
    assert found is not None
    assert torch.equal(found, page())


def test_pages_of_another_shape_are_no_hit(tmp_path: Path) -> None:
    (key,) = names(1)
    PrefixStore(tmp_path, SHAPE).save(key, page())
    assert not PrefixStore(tmp_path, (3, 2, 4, 9)).has(key)


def test_the_limit_removes_what_was_unused_longest(tmp_path: Path) -> None:
    probe = PrefixStore(tmp_path / "probe", SHAPE)
    probe.save(names(1)[0], page())
    size = kept(tmp_path / "probe")[0].stat().st_size
    store = PrefixStore(tmp_path / "kept", SHAPE, max_bytes=10 * size)
    keys = names(30)
    for number, key in enumerate(keys):
        store.save(key, page(number))
        os.utime(store._path(key), ns=(number, number))
        if number == 8:
            store.touch(keys[:2])
        assert sum(file.stat().st_size for file in kept(tmp_path / "kept")) <= 11 * size
    assert store.has(keys[0])
    assert store.has(keys[1])
    assert store.has(keys[29])
    assert not any(store.has(key) for key in keys[2:18])


def test_of_a_touched_prefix_the_end_goes_first(tmp_path: Path) -> None:
    store = PrefixStore(tmp_path, SHAPE)
    keys = names(5)
    for key in keys:
        store.save(key, page())
    store.touch(keys)
    times = [store._path(key).stat().st_mtime_ns for key in keys]
    assert times == sorted(times, reverse=True)


def test_temporary_files_without_a_writer_are_removed(tmp_path: Path) -> None:
    store = PrefixStore(tmp_path, SHAPE, max_bytes=100 * BYTES)
    folder = tmp_path / "ab"
    folder.mkdir()
    old, young = folder / ".old", folder / ".young"
    for file in (old, young):
        file.write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)
    store.save(names(1)[0], page())
    assert not old.exists()
    assert young.exists()


def test_processes_that_write_and_remove_at_once_lose_nothing_but_hits(tmp_path: Path) -> None:
    """Every page that is found is the right one, whoever wrote it and whatever is being removed."""
    script = f"""
import random, sys, torch
from pathlib import Path
from kvfold.serving.prefixes import PrefixStore, page_keys
keys = page_keys("a", range(4 * 40), 4)
store = PrefixStore(Path({str(tmp_path)!r}), {SHAPE}, max_bytes=12 * 600)
turns = random.Random(int(sys.argv[1]))
hits = 0
for _ in range(300):
    number = turns.randrange(40)
    want = torch.full({SHAPE}, number, dtype=torch.uint8)
    found = store.load(keys[number])
    if found is not None:
        hits += 1
        assert torch.equal(found, want)
    store.save(keys[number], want)
print(hits)
"""
    running = [
        subprocess.Popen([sys.executable, "-c", script, str(seed)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for seed in range(3)
    ]
    for process in running:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        assert int(out) > 0
        assert not error
    assert not list(tmp_path.glob("*/.*"))


def test_bad_folders_and_limits_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="a folder for prefixes"):
        PrefixStore(tmp_path / "file", SHAPE)
    with pytest.raises(InputError, match="room for a page"):
        PrefixStore(tmp_path / "folder", SHAPE, max_bytes=BYTES - 1)


def test_a_models_identity_is_its_content(tmp_path: Path) -> None:
    for name, fill in (("a", 1), ("b", 1), ("c", 2)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes([fill]) * 3_000_000)
    assert model_identity(tmp_path / "a") == model_identity(tmp_path / "b") != model_identity(tmp_path / "c")
    (tmp_path / "b" / "README.md").write_text("more")
    assert model_identity(tmp_path / "a") == model_identity(tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text('{"hidden_size": 2}')
    assert model_identity(tmp_path / "a") != model_identity(tmp_path / "b")
