"""`kvfold compare`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from kvfold.bench.plot import plot_rates
from kvfold.bench.report import write_report
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
from kvfold.evaluate.compare import Compared
from kvfold.evaluate.compare import compare as run

PICTURE, REPORT, CODECS = "rate_distortion.png", "report.html", "codecs"


def compare(args: argparse.Namespace) -> None:
    """`kvfold compare`: a row a codec, told as it is done; JSON and table, and with --out picture, report and codecs."""
    check_outputs(args, "compare")
    text, calibration = read_texts(args.text), None if args.calibration_text is None else read_texts(args.calibration_text)
    out = _folder(args.out)
    model, tokenizer = named_model(args)
    sizes = {name: getattr(args, name) for name in ("context", "windows", "sinks", "window", "seed", "tokens", "codecs")}
    rows = run(
        model,
        tokenizer,
        calibration,
        text,
        **sizes,
        keep=None if out is None else out / CODECS,
        each=lambda row: print(f"{row.name}: {row.evaluation.perplexity_ratio:.4f} x exact", file=sys.stderr),
    )
    facts = [row.to_json() for row in rows]
    cells = _cells(rows)
    first = rows[0].evaluation
    about = (
        f"{args.model}: {first.windows} windows of {first.context} tokens, sinks {first.sinks}, window {first.window}, "
        f"exact perplexity {first.perplexity_exact:.3f}"
    )
    emit(args, facts, f"{about}\n{table(cells)}")
    record_if_asked(args, "compare", {"rows": facts})
    if out is not None:
        picture(lambda: plot_rates(_lines(rows), about, out / PICTURE), out / PICTURE)
        command = shlex.join(["kvfold", *sys.argv[1:]])
        write_report("Codecs compared", about, cells, out / PICTURE, command, out / REPORT)
        print(f"kvfold: wrote {out / REPORT}", file=sys.stderr)


def _folder(name: str | None) -> Path | None:
    if name is None:
        return None
    folder = Path(name)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError("a folder for --out", f"{folder} ({error.strerror})", "choose another") from None
    return folder


def _cells(rows: Sequence[Compared]) -> list[list[str]]:
    cells = [["codec", "bits", "with codebooks", "perplexity", "over exact", "KL", "top-1", "coded, tokens/s", "decoded"]]
    for row in rows:
        result = row.evaluation
        numbers = [result.bits_per_element, result.bits_per_element_with_codebooks, result.perplexity]
        cells.append(
            [
                row.name,
                *(f"{number:.3f}" for number in numbers),
                *(f"{number:.4f}" for number in (result.perplexity_ratio, result.kl_mean)),
                f"{result.top1_agreement:.1%}",
                *(f"{number:,.0f}" for number in (row.encode_tokens_per_s, row.decode_tokens_per_s)),
            ]
        )
    return cells


def _lines(rows: Sequence[Compared]) -> dict[str, list[tuple[float, float, float]]]:
    """Method -> (bits, perplexity over exact, KL), by bits."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        result = row.evaluation
        point = (result.bits_per_element, result.perplexity_ratio, result.kl_mean)
        lines.setdefault(row.codec, []).append(point)
    return {name: sorted(points) for name, points in lines.items()}
