"""`kvfold calibrate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from kvfold import distributed
from kvfold.bench.plot import plot_curve
from kvfold.calibrate import HUB, Ema, parse_source
from kvfold.calibrate import calibrate as fit
from kvfold.calibrate.checkpoint import Checkpoint
from kvfold.codecs import method
from kvfold.codecs.artifact import CURVE, CURVE_PLOT, require_target
from kvfold.commands.common import (
    named_model,
    picture,
)
from kvfold.errors import InputError
from kvfold.files import read_text, replacing_file


def calibrate(args: argparse.Namespace) -> None:
    """`kvfold calibrate`: fit, write the folder, say in one line what it is."""
    require_target(args.out)
    method(args.codec)
    ema = _ema(args)
    names = args.text or []
    texts = [parse_source(name) if ema or name.startswith(HUB) else read_text(Path(name)) for name in names] or None
    model, tokenizer = named_model(args)
    sizes = {"tokens": args.tokens, "context": args.context}
    out = Path(args.out)
    stages = out.with_name(out.name + ".training")
    changes = dict(args.changes)
    fitted = fit(model, tokenizer, texts, args.codec, args.seed, **sizes, settings=changes, ema=ema, checkpoint=stages)
    if distributed.rank():
        return  # under torchrun, process 0 writes
    fitted.save(args.out)
    if ema is not None and ema.checkpoint is not None:
        _keep_curve(Path(ema.checkpoint), Path(args.out), f"{args.codec} on {args.model}")
    pairs = [pair for pair in fitted.info["distortion"] if pair is not None]
    mean = sum(map(sum, pairs)) / (2 * len(pairs))
    print(
        f"{args.out}: {fitted.bits_per_element:.3f} bits per element, {fitted.codebook_bytes:,} bytes of codebooks, "
        f"mean distortion {mean:.4g}"
    )


def _ema(args: argparse.Namespace) -> Ema | None:
    names = ("ema_batch_tokens", "ema_decay", "ema_reseed", "checkpoint", "checkpoint_every", "resume")
    given = {name: getattr(args, name) for name in names if getattr(args, name) not in (None, False)}
    if args.ema_steps is None:
        if given:
            option = "--" + next(iter(given)).replace("_", "-")
            raise InputError(f"--ema-steps with {option}", f"{option} alone", "add --ema-steps N, or leave it out")
        return None
    out = Path(args.out)
    folder = Path(given.pop("checkpoint", out.with_name(out.name + ".ema")))
    if folder.resolve() == out.resolve():
        raise InputError("a --checkpoint folder other than --out", str(folder), "choose another")
    renamed = {name.removeprefix("ema_").replace("checkpoint_every", "every"): value for name, value in given.items()}
    return Ema(args.ema_steps, checkpoint=folder, **renamed)


def _keep_curve(checkpoint: Path, out: Path, title: str) -> None:
    """The loss curve into the codec's folder, and a picture of it."""
    with replacing_file(out / CURVE) as fresh:
        fresh.write_bytes((checkpoint / CURVE).read_bytes())
    picture(lambda: plot_curve(Checkpoint(checkpoint).curve(), title, out / CURVE_PLOT), out / CURVE_PLOT)
