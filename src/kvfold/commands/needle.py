"""`kvfold needle`."""

from __future__ import annotations

import argparse
from pathlib import Path

from kvfold.bench.plot import plot_needle
from kvfold.codecs.artifact import load
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
from kvfold.evaluate.needle import NeedleResult
from kvfold.evaluate.needle import needle as test_needle


def needle(args: argparse.Namespace) -> None:
    """`kvfold needle`: a row a cache and depth, a column a context, and a picture."""
    names = [Path(folder).name for folder in args.codec]
    if len(set(names)) < len(names):
        raise InputError("codec folders of different names", ", ".join(args.codec), "rename one")
    codecs = {name: load(folder) for name, folder in zip(names, args.codec, strict=True)}
    check_outputs(args, "needle")
    texts = None if args.text is None else read_texts(args.text)
    model, tokenizer = named_model(args)
    sizes = {"contexts": args.contexts, "depths": args.depths, "sinks": args.sinks, "window": args.window}
    result = test_needle(model, tokenizer, codecs, texts, seed=args.seed, **sizes)
    emit(args, result.to_json(), _needle_table(result))
    record_if_asked(args, "needle", result.to_json())
    if args.plot:
        _plot_needle(result, Path(args.plot))


def _needle_table(result: NeedleResult) -> str:
    rows = [["cache", "depth, %", *(f"{context:,}" for context in result.contexts)]]
    for name in result.found:
        for depth, shares in zip(result.depths, result.grid(name), strict=True):
            rows.append([name, f"{depth:g}", *("found" if share else "-" for share in shares)])
    found = ", ".join(f"{name} {share:.0%}" for name, share in result.found.items())
    return f"{table(rows)}\n\nfound: {found}; {result.seconds:.0f} s"


def _plot_needle(result: NeedleResult, file: Path) -> None:
    bits = {answer.cache: answer.bits_per_element for answer in result.answers if answer.context == result.contexts[-1]}
    titles = {name: name if bits[name] is None else f"{name}, {bits[name]:.2f} bits" for name in result.found}
    panels = {f"{titles[name]}: {share:.0%}": result.grid(name) for name, share in result.found.items()}
    picture(lambda: plot_needle(panels, result.contexts, result.depths, file), file)
