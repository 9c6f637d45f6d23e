"""What several commands share: model, codecs and text by name, tables, JSON, records, pictures."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging

from kvfold import distributed
from kvfold.bench.record import record, record_file
from kvfold.codecs import resolve_settings
from kvfold.codecs.artifact import CodecSet, load
from kvfold.errors import InputError
from kvfold.files import read_text, replacing_file, require_file_target
from kvfold.integration.models import AUTO, input_device, load_model


def table(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Columns padded to equal width; those in `left` start at the left, the others end at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(cells)).rstrip())
    return "\n".join(lines)


def quiet_libraries() -> None:
    """No progress bars and warnings of transformers; what matters to the user is an error of ours."""
    hub_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def prepare(args: argparse.Namespace) -> None:
    """Threads, device, and no chatter from the libraries."""
    quiet_libraries()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise InputError("a device torch can use here, such as cpu", f"{args.device!r} ({first})", "change --device") from None


def named_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """Model and tokenizer of the options; `args.device` becomes the device that takes its inputs."""
    auto = args.device == AUTO
    args.device = "cpu" if auto else distributed.local_device(args.device)
    prepare(args)
    model, tokenizer = load_model(args.model, args.dtype, AUTO if auto else args.device)
    args.device = str(input_device(model))
    return model, tokenizer


def chosen_codecs(args: argparse.Namespace) -> CodecSet:
    """The codec folder, searched with another beam if `--set beam=N` says so."""
    loaded = load(args.codec)
    changes = dict(args.changes)
    if set(changes) - {"beam"}:
        other = ", ".join(sorted(set(changes) - {"beam"}))
        raise InputError("only beam with --set here", other, "set it when you calibrate")
    if not changes:
        return loaded
    return loaded.with_beam(resolve_settings(loaded.method, changes, loaded.spec.head_dim)["beam"])


def read_texts(files: Sequence[str]) -> list[str]:
    """The texts of files; InputError for one that is missing, empty or no text."""
    return [read_text(Path(file)) for file in files]


def check_json(args: argparse.Namespace) -> None:
    """Raise InputError if `--json FILE` cannot be written: asked before the long work."""
    if args.json not in (None, "-"):
        require_file_target(Path(args.json))


def emit(args: argparse.Namespace, facts: Any, text: str) -> None:
    """The result for people, or as JSON, or both."""
    document = json.dumps(facts, indent=1)
    print(document if args.json == "-" else text)
    if args.json not in (None, "-"):
        with replacing_file(Path(args.json)) as fresh:
            fresh.write_text(document + "\n")


def check_outputs(args: argparse.Namespace, kind: str) -> None:
    """The same for what `--json`, `--record` and `--plot` name."""
    check_json(args)
    if args.record:
        record_file(args.record, kind)
    if getattr(args, "plot", None):
        require_file_target(Path(args.plot))


def record_if_asked(args: argparse.Namespace, kind: str, facts: dict[str, Any]) -> None:
    """Append result and machine to the record that `--record` names, if it was given."""
    if args.record:
        config = {name: value for name, value in vars(args).items() if name not in ("command", "json", "record")}
        file = record(args.record, kind, {"config": config, **facts})
        print(f"kvfold: recorded in {file}", file=sys.stderr)


def picture(draw: Callable[[], None], file: Path) -> bool:
    """Draw, and say where to; without matplotlib, say what to install. Returns whether there is a picture."""
    try:
        draw()
    except ImportError:
        print("kvfold: no picture without matplotlib: pip install kvfold[plot]", file=sys.stderr)
        return False
    print(f"kvfold: wrote {file}", file=sys.stderr)
    return True
