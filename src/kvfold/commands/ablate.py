"""`kvfold ablate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kvfold.bench.plot import plot_bars
from kvfold.calibrate.finetune import FinetuneSettings
from kvfold.codecs import method
from kvfold.commands.common import (
    check_outputs,
    emit,
    named_model,
    picture,
    read_texts,
    record_if_asked,
    table,
)
from kvfold.evaluate.ablate import ABLATIONS, AblationRow
from kvfold.evaluate.ablate import ablate as run


def ablate(args: argparse.Namespace) -> None:
    """`kvfold ablate`: a row a variant, told as it is done; JSON, table and picture at the end."""
    method(args.codec)
    check_outputs(args, "ablate")
    text, calibration = read_texts(args.text), None if args.calibration_text is None else read_texts(args.calibration_text)
    model, tokenizer = named_model(args)
    title, variants = ABLATIONS[args.what]
    print(f"{title}: {len(variants)} variants of {args.codec}", file=sys.stderr)
    rows = run(
        model,
        tokenizer,
        args.what,
        calibration,
        text,
        codec=args.codec,
        settings=dict(args.changes),
        seed=args.seed,
        tokens=args.tokens,
        context=args.context,
        windows=args.windows,
        finetuning=FinetuneSettings(steps=args.steps, lr=args.lr),
        keep=None if args.keep is None else Path(args.keep),
        each=lambda row: print(f"{row.name}: {row.evaluation.perplexity_ratio:.4f} x exact", file=sys.stderr),
    )
    facts = [row.to_json() for row in rows]
    emit(args, facts, _table(title, rows))
    record_if_asked(args, "ablate", {"what": args.what, "rows": facts})
    if args.plot:
        names, ratios, file = [row.name for row in rows], [row.evaluation.perplexity_ratio for row in rows], Path(args.plot)
        picture(lambda: plot_bars(names, ratios, title, "perplexity over exact", file), file)


def _table(title: str, rows: Sequence[AblationRow]) -> str:
    cells = [["variant", "rate", "bits", "perplexity", "over exact", "KL", "top-1"]]
    for row in rows:
        result = row.evaluation
        numbers = [row.rate, result.bits_per_element, result.perplexity, result.perplexity_ratio, result.kl_mean]
        cells.append([row.name, *(f"{x:.4g}" for x in numbers), f"{result.top1_agreement:.3f}"])
    first = rows[0].evaluation
    head = f"{title}; exact perplexity {first.perplexity_exact:.3f}, {first.windows} windows of {first.context} tokens"
    return f"{head}\n{table(cells)}"
