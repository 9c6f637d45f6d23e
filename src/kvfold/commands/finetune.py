"""`kvfold finetune`."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvfold.calibrate import parse_source
from kvfold.calibrate.finetune import CODEC, FinetuneSettings
from kvfold.calibrate.finetune import finetune as train
from kvfold.codecs.artifact import load
from kvfold.commands.common import (
    named_model,
)
from kvfold.files import require_folder_target


def finetune(args: argparse.Namespace) -> None:
    """`kvfold finetune`: train, write the model folder with its codec. Ctrl-C keeps the steps done so far."""
    codecs = load(args.codec)
    require_folder_target(Path(args.out))
    settings = FinetuneSettings(
        steps=args.steps,
        tokens_per_step=args.tokens_per_step,
        context=args.context,
        loss=args.loss,
        train=args.train,
        lr=args.lr,
        ema=args.ema,
        decay=args.ema_decay,
        commitment=args.commitment,
        checkpointing=args.gradient_checkpointing,
        rank=args.rank,
    )
    texts = [parse_source(name) for name in args.text]
    model, tokenizer = named_model(args)
    with _until_interrupted() as stop:
        result = train(model, tokenizer, codecs, texts, settings, seed=args.seed, stop=stop)
    result.save(args.out, tokenizer)
    losses = [row["loss"] for row in result.curve]
    some = max(1, len(losses) // 10)
    first, last = sum(losses[:some]) / some, sum(losses[-some:]) / some
    print(
        f"{args.out}: {len(losses)} of {settings.steps} steps, {settings.loss} loss {first:.4f} to {last:.4f} nats a token "
        f"(means of the first and last {some}); its codec: {Path(args.out, CODEC)}"
    )
    if stop():
        raise KeyboardInterrupt


@contextmanager
def _until_interrupted() -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C was pressed; pressed again, it interrupts at once."""
    pressed = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, before)
        print("kvfold: stopping after this step; Ctrl-C again stops at once and keeps nothing", file=sys.stderr)

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
