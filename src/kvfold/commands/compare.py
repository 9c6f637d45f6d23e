"""`kvfold compare`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvfold import __version__
from kvfold.bench.plot import plot_rates
from kvfold.bench.record import circumstances
from kvfold.bench.report import Column, Line, write_report
from kvfold.commands.common import (
    check_outputs,
    emit,
    named_model,
    picture,
    read_texts,
    record_if_asked,
    table,
)
from kvfold.errors import InputError
from kvfold.evaluate.compare import ROWS, parse_codec
from kvfold.evaluate.compare import compare as run
from kvfold.evaluate.rows import Compared, Failed
from kvfold.files import require_file_target

PICTURE, REPORT = "rate_distortion.png", "report.html"
Row = Compared | Failed

COLUMNS = {  # field of a row's JSON -> how it is shown
    "bits_per_element": Column("bits", "bits", ".3f", "bits an element of keys and values, read off the cache's buffers"),
    "bits_per_element_with_codebooks": Column("total", "with codebooks", ".3f", "the same, codebooks counted as well"),
    "perplexity": Column("perplexity", "perplexity", ".3f", "teacher-forced, read through the compressed cache"),
    "perplexity_ratio": Column("ratio", "over exact", ".4f", "perplexity over that of the exact cache"),
    "kl_mean": Column("kl", "KL", ".4f", "from the exact model's next-token distributions to the compressed, nats a token"),
    "top1_agreement": Column("top1", "top-1", ".1%", "tokens whose likeliest successor stays the same"),
    "encode_tokens_per_s": Column(
        "encode", "encode, tokens/s", ",.0f", "tokens a second whose keys and values of all layers are coded"
    ),
    "decode_tokens_per_s": Column("decode", "decode, tokens/s", ",.0f", "the same, decoded again"),
}


def compare(args: argparse.Namespace) -> None:
    """`kvfold compare`: a row a codec, told as it is done; JSON and table, and with --out picture, report, rows and codecs.

    Raises:
        SystemExit: status 1, if a row failed; the others are shown all the same.
    """
    check_outputs(args, "compare")
    text, calibration = read_texts(args.text), None if args.calibration_text is None else read_texts(args.calibration_text)
    out = _folder(args.out)
    device = args.device
    model, tokenizer = named_model(args)
    sizes = {name: getattr(args, name) for name in ("context", "windows", "sinks", "window", "seed", "tokens", "codecs")}
    try:
        rows = run(model, tokenizer, calibration, text, **sizes, keep=out)
    except KeyboardInterrupt:
        if out is not None:
            print(f"kvfold: finished rows are kept in {out / ROWS}; the same command goes on from there", file=sys.stderr)
        raise
    facts = [row.to_json() for row in rows]
    about = _about(args, rows)
    failed = [row for row in rows if isinstance(row, Failed)]
    emit(args, facts, "\n".join([about, table(_cells(rows)), *(f"{row.name} failed: {row.error}" for row in failed)]))
    record_if_asked(args, "compare", {"rows": facts})
    if out is not None:
        points = _points(rows)
        drawn = bool(points) and picture(lambda: plot_rates(points, about, out / PICTURE), out / PICTURE)
        write_report(
            out / REPORT,
            "Codecs compared",
            about,
            list(COLUMNS.values()),
            [_line(args, device, row) for row in rows],
            out / PICTURE if drawn else None,
            args.command_line,
            _facts(args),
        )
        print(f"kvfold: wrote {out / REPORT}", file=sys.stderr)
    if failed:
        print(f"kvfold: {len(failed)} of {len(rows)} rows failed; the same command tries them again", file=sys.stderr)
        raise SystemExit(1)


def _folder(name: str | None) -> Path | None:
    """The folder `name`, made if its parent exists, and able to take the report."""
    if name is None:
        return None
    folder = Path(name)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError("a folder for --out", f"{folder} ({error.strerror})", "choose another") from None
    for file in (PICTURE, REPORT, ROWS):
        require_file_target(folder / file)
    return folder


def _about(args: argparse.Namespace, rows: Sequence[Row]) -> str:
    done = next((row.evaluation for row in rows if isinstance(row, Compared)), None)
    windows = f"{args.windows} windows of {args.context}" if done is None else f"{done.windows} windows of {done.context}"
    exact = "" if done is None else f", exact perplexity {done.perplexity_exact:.3f}"
    return f"{args.model}: {windows} tokens, sinks {args.sinks}, window {args.window}{exact}"


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table in the terminal, heads first."""
    cells = [["codec", *(column.head for column in COLUMNS.values())]]
    for row in rows:
        texts = [column.text(number) for column, number in zip(COLUMNS.values(), _numbers(row), strict=False)]
        cells.append([row.name, *(texts or ["failed", *["-"] * (len(COLUMNS) - 1)])])
    return cells


def _numbers(row: Row) -> list[float]:
    """A number a column; none of a row that failed."""
    facts = row.to_json()
    return [] if isinstance(row, Failed) else [facts[field] for field in COLUMNS]


def _points(rows: Sequence[Row]) -> dict[str, list[tuple[float, float, float]]]:
    """Method -> (bits, perplexity over exact, KL), by bits."""
    points: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        if isinstance(row, Compared):
            result = row.evaluation
            point = (result.bits_per_element, result.perplexity_ratio, result.kl_mean)
            points.setdefault(row.codec, []).append(point)
    return {name: sorted(found) for name, found in points.items()}


def _line(args: argparse.Namespace, device: str, row: Row) -> Line:
    error, made = (row.error, "") if isinstance(row, Failed) else ("", f"Measured {_made(row.made)}.")
    return Line(row.name, row.codec, _numbers(row), error, row.settings, _commands(args, device, row.name), made)


def _commands(args: argparse.Namespace, device: str, name: str) -> list[str]:
    """What makes the row `name` without `compare`: a calibration and an evaluation. `device` is --device as it was given."""
    method, changes = parse_codec(name)
    folder = "-".join([method, *(f"{key}{value}" for key, value in changes.items())])
    settings = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    text = [] if args.calibration_text is None else ["--text", *args.calibration_text]
    common = ["--dtype", args.dtype, "--device", device, *(["--threads", str(args.threads)] if args.threads else [])]
    fitting = ["--codec", method, *settings, *text, "--tokens", str(args.tokens), "--seed", str(args.seed), *common]
    sizes = [word for size in ("context", "windows", "sinks", "window") for word in (f"--{size}", str(getattr(args, size)))]
    return [
        shlex.join(["kvfold", "calibrate", args.model, *fitting, "--out", folder]),
        shlex.join(["kvfold", "eval", args.model, "--codec", folder, "--text", *args.text, *sizes, *common]),
    ]


def _facts(args: argparse.Namespace) -> dict[str, str]:
    """What the report says of the whole run."""
    return {
        "model": f"{args.model}, {args.dtype}",
        "text": " ".join(args.text),
        "calibrated on": f"{' '.join(args.calibration_text or ['what the model says'])}, {args.tokens} tokens",
        "seed": str(args.seed),
        "protocol": f"{args.windows} windows of {args.context} tokens, sinks {args.sinks}, window {args.window}",
        "written": _made(circumstances()),
        "kvfold": __version__,
    }


def _made(where: dict[str, Any]) -> str:
    """Date, git ref and machine in words."""
    machine = where["machine"]
    libraries = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "transformers"))
    cores = f"{machine['cores']} cores, {machine['threads']} threads, {machine['gpu'] or 'no GPU'}"
    return f"{where['date']}, git {where['git'] or 'none'}, {machine['cpu']}, {cores}, {libraries}"
