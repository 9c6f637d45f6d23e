"""Rows of a comparison, and the file that keeps them: a JSON line a row, written as the row is done.

A line names what its figures depend on: `run` (model, texts, sizes, seed), `codec` and `settings`. A later run takes the lines
that are its own and leaves the others in place. A line is added by replacing the file in one step, so that it is always whole.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kvfold.errors import InputError
from kvfold.evaluate.evaluate import Evaluation
from kvfold.files import replacing_file


@dataclass(frozen=True)
class Compared:
    """One codec and its settings.

    Attributes:
        name: as it was asked for.
        settings: all of the method's.
        encode_tokens_per_s, decode_tokens_per_s: tokens a second whose keys and values of all layers are coded, and decoded.
        made: date, git ref and machine of the measurement.
    """

    name: str
    codec: str
    settings: dict[str, Any]
    encode_tokens_per_s: float
    decode_tokens_per_s: float
    evaluation: Evaluation
    made: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        own = {name: value for name, value in asdict(self).items() if name != "evaluation"}
        return {**self.evaluation.to_json(), "perplexity_ratio": self.evaluation.perplexity_ratio, **own}

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> Compared:
        """What `to_json` wrote; KeyError if a field is missing."""
        evaluation = Evaluation(**{field.name: facts[field.name] for field in fields(Evaluation)})
        own = {field.name: facts[field.name] for field in fields(cls) if field.name != "evaluation"}
        return cls(**own, evaluation=evaluation)


@dataclass(frozen=True)
class Failed:
    """A codec that could not be calibrated or measured; `error` says why."""

    name: str
    codec: str
    settings: dict[str, Any]
    error: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class KeptRows:
    """Finished rows of the run `run`, in `file` or, if that is None, in memory alone.

    Raises:
        InputError: the file holds something else, or cannot be read.
    """

    def __init__(self, file: Path | None, run: str) -> None:
        self._file, self._run = file, run
        lines = (json.loads(line) for line in self._lines())
        self._rows = {_key(line["codec"], line["settings"]): line for line in lines if line["run"] == run}

    def find(self, codec: str, settings: dict[str, Any]) -> Compared | None:
        """The row of `codec` at exactly these settings, if it was measured."""
        facts = self._rows.get(_key(codec, settings))
        try:
            return None if facts is None else Compared.from_json(facts)
        except KeyError:  # of a kvfold that measured less
            return None

    def add(self, row: Compared) -> None:
        """Keep the row. The file is read again first: another run may have added to it."""
        facts = {"run": self._run, **row.to_json()}
        self._rows[_key(row.codec, row.settings)] = facts
        if self._file is not None:
            lines = [*self._lines(), json.dumps(facts)]
            with replacing_file(self._file) as fresh:
                fresh.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def _lines(self) -> list[str]:
        if self._file is None or not self._file.exists():
            return []
        try:
            lines = self._file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise _foreign(f"{self._file} ({error})") from None
        for number, line in enumerate(lines, 1):
            try:
                whole = {"run", "codec", "settings"} <= json.loads(line).keys()
            except (ValueError, AttributeError):
                whole = False
            if not whole:
                raise _foreign(f"line {number} of {self._file}, which is something else")
        return lines


def _key(codec: str, settings: dict[str, Any]) -> str:
    return json.dumps([codec, settings], sort_keys=True)


def _foreign(came: str) -> InputError:
    return InputError("rows of `kvfold compare`, a JSON object a line", came, "move the file away, or choose another --out")
