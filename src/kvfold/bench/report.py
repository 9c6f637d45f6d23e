"""A report in one HTML file that needs no other: a table, a picture, how it was made."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from kvfold.files import replacing_file

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3em .8em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
pre { background: #f4f4f4; padding: .7em; overflow-x: auto; }
"""


def write_report(title: str, about: str, rows: Sequence[Sequence[str]], picture: Path | None, made_by: str, file: Path) -> None:
    """Write the report; the first of `rows` are the column heads.

    Raises:
        InputError: the file cannot be written.
    """
    head, *body = rows
    heads = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    image = ""
    if picture is not None and picture.exists():
        data = base64.b64encode(picture.read_bytes()).decode()
        image = f'<p><img alt="{html.escape(title)}" src="data:image/png;base64,{data}"></p>'
    text = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1><p>{html.escape(about)}</p>{image}"
        f"<table><tr>{heads}</tr>\n{lines}</table><p>Made by</p><pre>{html.escape(made_by)}</pre></body></html>\n"
    )
    with replacing_file(file) as fresh:
        fresh.write_text(text, encoding="utf-8")
