"""Answers to requests, kept in a file of JSON lines so that a long run that was cut off goes on where it was.

The first line says what run the file belongs to; every other line is one answer. A line cut short by a crash is dropped.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from kvfold.errors import InputError
from kvfold.files import require_file_target

_KIND = "kvfold answers"


class Answers:
    """Answers by request, in memory, and in `file` if one is given.

    Args:
        file: read if it exists, made if it does not, appended to.
        run: what the answers depend on; a file of another run is refused.

    Raises:
        InputError: `file` belongs to another run, is something else, or lies in no folder.
    """

    def __init__(self, file: Path | None, run: dict[str, Any]) -> None:
        self._file = file
        self._had: dict[str, Any] = {}
        if file is None:
            return
        require_file_target(file)
        header = {"kind": _KIND, **json.loads(json.dumps(run))}
        if file.exists() and file.stat().st_size:
            self._load(file, header)
        else:
            file.write_text(json.dumps(header) + "\n", encoding="utf-8")

    def __len__(self) -> int:
        return len(self._had)

    def get(self, request: Any) -> Any | None:
        """The answer to `request` (anything JSON can hold), or None."""
        return self._had.get(_key(request))

    def put(self, request: Any, answer: Any) -> None:
        """Keep an answer; it is on disk when this returns."""
        key = _key(request)
        self._had[key] = answer
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as out:
                out.write(json.dumps([key, answer]) + "\n")

    def _load(self, file: Path, header: dict[str, Any]) -> None:
        what = f"a file of answers that `--resume {file}` began"
        try:
            text = file.read_bytes().decode()
            first, *lines = text.splitlines()
            found = json.loads(first)
            whole = lines if text.endswith("\n") else lines[:-1]
            self._had = dict(json.loads(line) for line in whole)
        except (ValueError, TypeError) as error:
            raise InputError(what, f"something else ({error})", "give another file") from None
        if found != header:
            other = found if isinstance(found, dict) else {}
            names = [name for name in header if other.get(name) != header[name]]
            raise InputError(what, f"one of another run ({', '.join(names)} differ)", "give another file") from None
        if whole is not lines:  # what a crash left of the last line would spoil the next one
            file.write_text("".join(f"{line}\n" for line in (first, *whole)), encoding="utf-8")


def _key(request: Any) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True, default=str).encode()).hexdigest()[:24]
