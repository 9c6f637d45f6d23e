from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from kvfold.errors import InputError
from kvfold.files import read_json, read_tensors, replacing_file, replacing_folder


def fail_halfway(replacing: Callable[[Path], AbstractContextManager[Path]], path: Path) -> None:
    with replacing(path) as temporary:
        (temporary / "marker" if temporary.is_dir() else temporary).write_text("half")
        raise RuntimeError


def replacing_marked(path: Path) -> AbstractContextManager[Path]:
    return replacing_folder(path, {"marker", "first", "second"})


@pytest.mark.parametrize("replacing", [replacing_file, replacing_marked])
def test_what_fails_halfway_is_not_there(tmp_path: Path, replacing) -> None:
    with pytest.raises(RuntimeError):
        fail_halfway(replacing, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out"
    for text in ("first", "second"):
        with replacing_file(path) as temporary:
            temporary.write_text(text)
        with pytest.raises(RuntimeError):
            fail_halfway(replacing_file, path)
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        assert path.read_text() == text


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out"
    for text in ("first", "second"):
        with replacing_marked(path) as temporary:
            (temporary / "marker").write_text(text)
            (temporary / text).touch()
        with pytest.raises(RuntimeError):
            fail_halfway(replacing_marked, path)
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        assert {p.name for p in path.iterdir()} == {"marker", text}
        assert (path / "marker").read_text() == text


def test_a_folder_with_somebody_elses_file_is_left_alone(tmp_path: Path) -> None:
    for name in ("marker", "thesis.txt"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"thesis\.txt"), replacing_marked(tmp_path):
        pass
    assert {p.name for p in tmp_path.iterdir()} == {"marker", "thesis.txt"}


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with replacing_marked(tmp_path / "empty") as temporary:
        (temporary / "marker").touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["empty", "marker"]


def test_written_files_and_folders_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    (tmp_path / "usual folder").mkdir()
    with replacing_file(tmp_path / "file"):
        pass
    with replacing_folder(tmp_path / "folder"):
        pass
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "usual folder").stat().st_mode


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", b"\xff\xfe\x00", None, "folder"])
@pytest.mark.parametrize("read", [read_json, read_tensors])
def test_what_is_no_such_file_is_an_input_error(tmp_path: Path, read, content: str | bytes | None) -> None:
    path = tmp_path / "file"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=r"expected a thing; got .*file"):
        read(path, "a thing")


@pytest.mark.parametrize("read", [read_json, read_tensors])
def test_a_file_where_a_folder_should_be_is_an_input_error(tmp_path: Path, read) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="expected a thing"):
        read(tmp_path / "file" / "inside", "a thing")
