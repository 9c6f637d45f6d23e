"""Safetensors plus JSON on disk: written under a temporary name and renamed, checked when read, never unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kvfold.errors import InputError


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place if the block ends well and vanishes if it does not."""
    require_file_target(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path, own: Set[str] = frozenset()) -> Iterator[Path]:
    """The same for a folder; an existing one is replaced only if all it holds is files named in `own`."""
    require_folder_target(path, own)
    fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield fresh
        for file in fresh.rglob("*"):  # safetensors makes its files readable to their owner alone
            os.chmod(file, (0o777 if file.is_dir() else 0o666) & ~_umask())
        os.chmod(fresh, 0o777 & ~_umask())
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            os.replace(path, old / "old")
            os.replace(fresh, path)
            shutil.rmtree(old)
        else:
            os.replace(fresh, path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def require_file_target(path: Path) -> None:
    """Raise InputError unless `replacing_file(path)` can work: asked before long work, not after it."""
    _require_parent(path)
    if path.is_dir():
        raise InputError("a file to write", f"{path}, which is a folder", "choose another path")


def require_folder_target(path: Path, own: Set[str] = frozenset()) -> None:
    """Raise InputError unless `replacing_folder(path, own)` can work."""
    _require_parent(path)
    foreign = {file.name for file in path.iterdir()} - own if path.is_dir() else {path.name} if path.exists() else set()
    if foreign:
        names = ", ".join(sorted(own)) or "nothing"
        came = f"{path} with other files ({', '.join(sorted(foreign)[:3])})"
        raise InputError(f"a new folder, or one that holds only {names}", came, "choose another --out; nothing was changed")


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object; InputError if the file is missing or is not one. `what` names it to the user."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(what, f"nothing at {path}", "check the path") from None
    except NotADirectoryError:
        raise InputError(what, f"a file at {path.parent}", "give the folder") from None
    except OSError as error:
        raise InputError(what, f"{path}, which cannot be read ({error.strerror})", "check the path") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(what, f"{path}, which is not JSON ({error})", "make it again") from None
    if not isinstance(data, dict):
        raise InputError(what, f"{path}, which holds no JSON object", "make it again")
    return data


def read_text(path: Path) -> str:
    """A text file, UTF-8; InputError if it is missing, empty or something else."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError("a text file", f"nothing at {path}", "check the path") from None
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise InputError("a text file", f"{path} ({error.strerror})", "give a file that can be read") from None
    except UnicodeDecodeError as error:
        raise InputError("text in UTF-8", f"{path} ({error.reason} at byte {error.start})", "convert it to UTF-8") from None
    if not text.strip():
        raise InputError("a file with text", f"{path}, which is empty", "give another file")
    return text


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file; InputError if it is missing, cut short or something else."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(what, f"nothing at {path}", "check the path") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(what, f"{path}, which is damaged or cut short ({error})", "make it again") from None


def _require_parent(path: Path) -> None:
    if not path.parent.is_dir():
        raise InputError("an existing folder to write into", str(path.parent), "make it first, or choose another path")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
