"""Prefixes on disk: pages of codes under names that tell what they are, shared by processes, machines and restarts.

A file holds one page of tokens of all layers. Its name is a chain of hashes over what the codes depend on (`identity`: model,
codec, precision) and every token up to the page's end, so equal prefixes have equal names wherever they were computed, and a
longer prefix begins with the files of a shorter one. Files are written under a temporary name and renamed: a reader sees a
whole file or none. What is damaged, or another's, is no hit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from kvfold.errors import InputError
from kvfold.files import replacing_file

_FORMAT = "kvfold-prefix-1"
_SUFFIX = ".safetensors"
_SAMPLES, _SAMPLE = 16, 1 << 16  # places of a weights file that are hashed, bytes at each
_ABANDONED = 3600  # seconds after which a temporary file has no writer any more


def page_keys(identity: str, tokens: Sequence[int], page: int) -> list[str]:
    """Names of the full pages of `page` tokens that `tokens` begin with, in order."""
    ids = np.asarray(tokens, dtype="<i8")
    keys = []
    before = hashlib.sha256(f"{_FORMAT} {identity} {page}".encode()).digest()
    for start in range(0, len(ids) - page + 1, page):
        before = hashlib.sha256(before + ids[start : start + page].tobytes()).digest()
        keys.append(before.hex())
    return keys


def model_identity(folder: Path) -> str:
    """Hash of a model's configuration and of samples of its weights: finetuned weights differ nearly everywhere, and reading
    all of a large model would take minutes. Paths do not enter.

    Args:
        folder: with `config.json` and weights, or a weights file.
    """
    told = hashlib.sha256()
    files = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    for file in files:
        if file.suffix not in (".safetensors", ".bin", ".gguf") and file.name != "config.json":
            continue
        size = file.stat().st_size
        told.update(json.dumps([file.name, size]).encode())
        with file.open("rb") as opened:
            for number in range(_SAMPLES):
                opened.seek(number * max(0, size - _SAMPLE) // (_SAMPLES - 1))
                told.update(opened.read(_SAMPLE))
    return told.hexdigest()


class PrefixStore:
    """Pages `[layers, G, tokens, bytes]` uint8 by name, in a folder that several processes may share.

    Args:
        folder: made if it is not there.
        shape: of every page here; what has another is no hit.
        max_bytes: of all files, None for no limit. Those unused longest go when it is passed; because each process counts its
            own writes between two looks at the folder, it may be passed by a twentieth a process.
        part: which part of the heads, where tensor parallelism splits them: `"0of1"`.

    Raises:
        InputError: the folder cannot be made or written into, or the limit is below a page.
    """

    def __init__(self, folder: Path, shape: Sequence[int], max_bytes: int | None = None, part: str = "0of1") -> None:
        self.folder, self.shape, self.part = folder, tuple(shape), part
        size = int(np.prod(self.shape))
        if max_bytes is not None and max_bytes < size:
            raise InputError(
                f"room for a page, {size} bytes", f"a limit of {max_bytes}", "raise the limit of the prefix folder"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError("a folder for prefixes", f"{folder} ({error.strerror})", "choose another") from None
        if not os.access(folder, os.W_OK):
            raise InputError("a folder for prefixes", f"{folder}, which cannot be written", "choose another")
        self._max_bytes = max_bytes
        self._written = max_bytes or 0  # so that the first write looks at the folder
        self._sound: dict[Path, int] = {}  # inode of the files that were read and found whole
        self._warned = False

    def has(self, key: str) -> bool:
        """Whether `load` will find it; a file is read once for that, then only looked up."""
        path = self._path(key)
        try:
            inode = path.stat().st_ino
        except OSError:
            return False
        return self._sound.get(path) == inode or self.load(key) is not None

    def load(self, key: str) -> Tensor | None:
        """The page, None if it is not there or not sound."""
        path = self._path(key)
        try:
            with path.open("rb") as file:  # read whole: another process may remove it meanwhile
                inode, found = os.fstat(file.fileno()).st_ino, load(file.read())
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError) as error:
            self._ignore(path, str(error))
            return None
        page, digest = found.get("pages"), found.get("digest")
        if page is None or digest is None or page.shape != self.shape or digest.tolist() != _digest(key, page).tolist():
            self._ignore(path, "its content is not what its name says")
            return None
        self._sound[path] = inode
        return page

    def save(self, key: str, page: Tensor) -> None:
        """Keep a page; one that is there already stays."""
        if self.has(key):
            return
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        page = page.contiguous().cpu()
        with replacing_file(path) as fresh:
            save_file({"pages": page, "digest": _digest(key, page)}, fresh)
        self._written += page.numel()
        if self._max_bytes is not None and self._written > self._max_bytes // 20:
            self._evict()

    def remove(self, key: str) -> None:
        """Make sure that the page is not there."""
        self._path(key).unlink(missing_ok=True)
        self._sound.pop(self._path(key), None)

    def touch(self, keys: Sequence[str]) -> None:
        """Mark pages as used now, the first as the newest: without it the others are of no use."""
        now = time.time_ns()
        for number, key in enumerate(keys):
            try:
                os.utime(self._path(key), ns=(now - number, now - number))
            except OSError:  # another process has removed it
                continue

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.{self.part}{_SUFFIX}"

    def _ignore(self, path: Path, why: str) -> None:
        self._sound.pop(path, None)
        if not self._warned:
            self._warned = True
            logging.getLogger("kvfold").warning("ignoring %s: %s; others like it are ignored without a word", path, why)

    def _evict(self) -> None:
        """Remove the files unused longest until there is room for a twentieth more, and temporary files without a writer."""
        assert self._max_bytes is not None
        found = []
        for path, about in _files(self.folder):
            if path.name.startswith("."):
                if time.time() - about.st_mtime > _ABANDONED:
                    path.unlink(missing_ok=True)
            elif path.name.endswith(_SUFFIX):
                found.append((about.st_mtime_ns, about.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._max_bytes * 19 // 20:
                break
            path.unlink(missing_ok=True)
            self._sound.pop(path, None)
            total -= size
        self._written = 0


def _files(folder: Path) -> Iterable[tuple[Path, os.stat_result]]:
    """Of the folders below; another process may remove some meanwhile."""
    for below in folder.iterdir():
        if below.is_dir() and len(below.name) == 2:
            for path in below.iterdir():
                try:
                    yield path, path.stat()
                except OSError:
                    continue


def _digest(key: str, page: Tensor) -> Tensor:
    """Of a page under this name, uint8 `[16]`."""
    told = hashlib.blake2b(f"{_FORMAT} {key} {page.dtype}".encode(), digest_size=16)
    told.update(page.numpy().data)
    return torch.tensor(list(told.digest()), dtype=torch.uint8)
