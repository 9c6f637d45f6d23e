"""`kvfold budget`."""

from __future__ import annotations

import argparse
from pathlib import Path

from kvfold.bench.plot import plot_lines
from kvfold.commands.common import (
    check_outputs,
    chosen_codecs,
    emit,
    named_model,
    picture,
    read_texts,
    record_if_asked,
    table,
)
from kvfold.evaluate.budget import BudgetRow, measure_budget


def budget(args: argparse.Namespace) -> None:
    """`kvfold budget`: a row a context, and a picture."""
    codecs = chosen_codecs(args)
    texts = read_texts(args.text)
    check_outputs(args, "budget")
    model, tokenizer = named_model(args)
    sizes = {name: getattr(args, name) for name in ("contexts", "windows", "sinks", "window")}
    rows = measure_budget(model, tokenizer, codecs, texts, args.max_bytes, **sizes)
    facts = [row.to_json() for row in rows]
    emit(args, facts, f"{args.model}, {codecs.method}, at most {args.max_bytes:,} bytes\n{_table(rows)}")
    record_if_asked(args, "budget", {"method": codecs.method, "settings": codecs.settings, "rows": facts})
    if args.plot:
        lines: dict[str, list[float | None]] = {
            f"at most {args.max_bytes / 2**20:.1f} MiB": [row.kl_limited for row in rows],
            "no limit": [row.kl_free for row in rows],
        }
        contexts = [row.context for row in rows]
        title, labels = f"{codecs.method} on {args.model}, newest tokens", ("tokens in the cache", "KL (nats a token)")
        picture(lambda: plot_lines(lines, contexts, title, *labels, Path(args.plot)), Path(args.plot))


def _table(rows: list[BudgetRow]) -> str:
    pairs = [f"{what}, {which}" for what in ("KL", "bits", "bytes") for which in ("limited", "free")]
    lines = [["context", *pairs, "bytes, bf16"]]
    for row in rows:
        numbers = [(row.kl_limited, ".4f"), (row.kl_free, ".4f"), (row.bits_limited, ".3f"), (row.bits_free, ".3f")]
        numbers += [(row.bytes_limited, ","), (row.bytes_free, ","), (row.bytes_bf16, ",")]
        lines.append([f"{row.context:,}", *("does not fit" if x is None else format(x, how) for x, how in numbers)])
    return table(lines, left=())
