"""Where text comes from: strings, files, or a data set of the Hugging Face hub, read piecewise and from any offset.

Text is cut into chunks of 4,096 to 65,536 characters, at the end of a paragraph if there is one, else of a line, else of
a word. Where chunks end depends on the text from their start on and on nothing else.
"""

from __future__ import annotations

import codecs
import hashlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from kvfold.errors import InputError

_LEAST, _MOST = 1 << 12, 1 << 16  # characters of a chunk
_PIECE = 1 << 20
_BORDER = re.compile(r"\n[ \t\r]*\n\s*")
HUB = "hf:"


class Source(Protocol):
    """Text that is read from an offset on; what an offset counts is the source's own affair."""

    def chunks(self, offset: int) -> Iterator[tuple[int, str]]:
        """Chunks from `offset` on, each with the offset of what follows it."""
        ...

    def identity(self) -> str:
        """Equal for equal text, as far as can be told without reading it: a resumed run compares it."""
        ...


@dataclass(frozen=True)
class PlainText:
    """A string; offsets are characters."""

    text: str

    def chunks(self, offset: int) -> Iterator[tuple[int, str]]:
        while offset < len(self.text):
            ahead = self.text[offset : offset + _MOST + 1]
            end = _chunk_end(ahead)
            offset += end
            yield offset, ahead[:end]

    def identity(self) -> str:
        return f"text {hashlib.sha256(self.text.encode(errors='surrogatepass')).hexdigest()}"


@dataclass(frozen=True)
class FileText:
    """A text file in UTF-8, read `piece` bytes at a time; offsets are bytes.

    Raises:
        InputError: no such file, or one that cannot be read; when it is reached, bytes that are not UTF-8.
    """

    path: Path
    piece: int = field(default=_PIECE, compare=False)

    def __post_init__(self) -> None:
        try:
            with self.path.open("rb"):
                pass
        except FileNotFoundError:
            raise InputError("a text file", f"nothing at {self.path}", "check the path") from None
        except OSError as error:
            raise InputError("a text file", f"{self.path} ({error.strerror})", "give a file that can be read") from None

    def chunks(self, offset: int) -> Iterator[tuple[int, str]]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        text, last = "", False
        with self.path.open("rb") as file:
            file.seek(offset)
            while True:
                while len(text) <= _MOST and not last:
                    data = file.read(self.piece)
                    last = not data
                    try:
                        text += decoder.decode(data, final=last)
                    except UnicodeDecodeError as error:
                        came = f"{self.path} ({error.reason} before byte {file.tell()})"
                        raise InputError("text in UTF-8", came, "convert it to UTF-8") from None
                if not text:
                    return
                end = _chunk_end(text)
                chunk, text = text[:end], text[end:]
                offset += len(chunk.encode())
                yield offset, chunk.replace("\r\n", "\n").replace("\r", "\n")

    def identity(self) -> str:
        return f"file {self.path.name} of {self.path.stat().st_size} bytes"


@dataclass(frozen=True)
class HubText:
    """A data set of the Hugging Face hub, read row by row through the package `datasets`; offsets are rows.

    Attributes:
        name: of the data set; `name@config` chooses a configuration.
        split, column: which rows, and where in a row the text is.

    Raises:
        InputError: the package is missing; when it is read, no such data set, split or column, or no network.
    """

    name: str
    split: str = "train"
    column: str = "text"

    def __post_init__(self) -> None:
        if importlib.util.find_spec("datasets") is None:
            fix = "pip install kvfold[hub], or give a text file"
            raise InputError(f"the package datasets, to read {HUB}{self.name}", "no such package", fix)

    @classmethod
    def parse(cls, text: str) -> HubText:
        """`hf:NAME[:split[:column]]`."""
        parts = text.removeprefix(HUB).split(":")
        if not text.startswith(HUB) or not all(parts) or len(parts) > 3:
            raise InputError(f"{HUB}NAME[:split[:column]]", repr(text), "for example hf:DKYoon/SlimPajama-6B:train:text")
        return cls(*parts)

    def chunks(self, offset: int) -> Iterator[tuple[int, str]]:
        text: list[str] = []
        for row in self._rows(offset):
            offset += 1
            if not isinstance(row.get(self.column), str):
                columns = ", ".join(name for name, value in row.items() if isinstance(value, str))
                came = f"{self.column!r} in {self.name}, whose text columns are {columns or 'none'}"
                raise InputError("a column with text", came, f"name it as {HUB}NAME:split:column")
            text.append(row[self.column].strip() + "\n\n")
            if sum(map(len, text)) >= _LEAST:
                yield offset, "".join(text)
                text = []
        if text:
            yield offset, "".join(text)

    def _rows(self, offset: int) -> Iterator[dict[str, Any]]:
        import datasets

        name, _, config = self.name.partition("@")
        try:
            rows = datasets.load_dataset(name, config or None, split=self.split, streaming=True)
            yield from rows.skip(offset) if offset else rows
        except (OSError, ValueError, RuntimeError) as error:
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            fix = "check name, split and network, or give a text file"
            raise InputError("a data set of the hub", f"{self.name!r} ({first})", fix) from None

    def identity(self) -> str:
        return f"{HUB}{self.name}:{self.split}:{self.column}"


Texts = Sequence["str | Path | Source"] | str | Path | Source  # strings are text; a Path is a file


def parse_source(name: str) -> Source:
    """What `--text` names: `hf:NAME[:split[:column]]`, or a file."""
    return HubText.parse(name) if name.startswith(HUB) else FileText(Path(name))


def sources_of(texts: Texts) -> list[Source]:
    """`texts` as sources: strings are joined in order by empty lines and come first.

    Raises:
        InputError: nothing but white space, or a file that cannot be read.
    """
    given: Sequence[Any] = texts if isinstance(texts, (list, tuple)) else [texts]
    joined = "\n\n".join(text for text in given if isinstance(text, str) and text.strip())
    sources: list[Source] = [PlainText(joined)] if joined else []
    sources += [FileText(text) if isinstance(text, Path) else text for text in given if not isinstance(text, str)]
    if not sources:
        raise InputError("calibration text", "none (empty or only white space)", "give a file with text")
    return sources


def _chunk_end(text: str) -> int:
    """Where the first chunk of `text` ends, which is longer than `_MOST` unless no more follows."""
    border = _BORDER.search(text, _LEAST, _MOST)
    if border is not None:
        return border.end()
    if len(text) <= _MOST:
        return len(text)
    return text.rfind("\n", _LEAST, _MOST) + 1 or text.rfind(" ", _LEAST, _MOST) + 1 or _MOST
