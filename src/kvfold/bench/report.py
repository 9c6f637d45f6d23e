"""A report in one HTML file that needs no other and no network: a picture, a table that sorts and filters, how it was made.

The page is `report.html.jinja` beside this file. It can be read without JavaScript; with it, an address says how it is sorted
and filtered: `report.html#sort=-bits&method=rvq`.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from kvfold.files import replacing_file

_TEMPLATE = "report.html.jinja"


class Column(NamedTuple):
    """A column of numbers.

    Attributes:
        key: its name in the address, `#sort=key`.
        head: its head.
        format: of its numbers, as in `format(number, ".3f")`.
        about: what it is, in a line.
    """

    key: str
    head: str
    format: str
    about: str

    def text(self, number: float) -> str:
        return format(number, self.format)


@dataclass(frozen=True)
class Line:
    """A row of the table.

    Attributes:
        name: of the row.
        method: what rows are filtered by.
        numbers: one a column; empty if the row failed.
        error: why it failed.
        settings: all of them, by name.
        commands: that make the row.
        made: when, where and from which code it was measured.
    """

    name: str
    method: str
    numbers: Sequence[float]
    error: str
    settings: Mapping[str, Any]
    commands: Sequence[str]
    made: str


def write_report(
    file: Path,
    title: str,
    about: str,
    columns: Sequence[Column],
    lines: Sequence[Line],
    picture: Path | None,
    command: str,
    facts: Mapping[str, str],
) -> None:
    """Write the report.

    Args:
        about: a line under the title.
        picture: a PNG to put into the file.
        command: that made all of it.
        facts: what else holds for the whole report, by name: the machine, the version.

    Raises:
        InputError: the file cannot be written.
    """
    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # every value, whatever the file is called
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    ).get_template(_TEMPLATE)
    text = page.render(
        title=title,
        about=about,
        columns=columns,
        lines=lines,
        methods=list(dict.fromkeys(line.method for line in lines)),
        command=command,
        facts=facts,
        picture=None if picture is None else base64.b64encode(picture.read_bytes()).decode(),
        isfinite=math.isfinite,
    )
    with replacing_file(file) as fresh:
        fresh.write_text(text, encoding="utf-8")
