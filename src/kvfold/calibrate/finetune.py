"""Finetuning a model together with its codec, so that it reads well from a compressed cache (arXiv 2410.15704, section 3).

Attention weights are trained by gradient through the codec (`integration/straight_through.py`), codebooks follow by moving
average (`codecs/ema.py`). Two losses, in nats a token:

    lm   -log p'(next token)                         the paper's
    kl   KL(p || p') over all next tokens            p: the model as it was, with an exact cache

with `p'` the model as it is, reading every key and value as its codes say. To either, `commitment` times the mean squared
error of the scaled keys and values is added (0 in the paper).

Cost of a step: for every token one forward and one backward pass, and with kl one more forward pass. Memory: the model, the
trained weights twice (the teacher's) and their gradient and two moments in float32, one pass's activations (`checkpointing`
keeps only those between layers), and the logits `[context, vocabulary]` three times, with lm twice in float32.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.bench.plot import plot_losses
from kvfold.calibrate.divergence import Divergence
from kvfold.calibrate.sources import Texts, sources_of
from kvfold.calibrate.stream import TextStream
from kvfold.calibrate.trainable import KINDS, Weights, trainable
from kvfold.codecs.artifact import CodecSet
from kvfold.codecs.ema import DECAY, EmaBooks
from kvfold.codecs.identity import IdentityCodec
from kvfold.codecs.residual import ResidualCodec
from kvfold.errors import InputError
from kvfold.files import replacing_folder
from kvfold.integration.attach import hooked
from kvfold.integration.models import input_device
from kvfold.integration.spec import model_spec
from kvfold.integration.straight_through import CodedSide, StraightThroughCache, checkpointed
from kvfold.progress import Progress

LOSSES = ("kl", "lm")
CODEC, CURVE, PLOT = "codec", "finetune.jsonl", "finetune.png"
_SHUFFLE = 64  # sequences that are held to be drawn from


@dataclass(frozen=True)
class FinetuneSettings:
    """What `finetune` does.

    Attributes:
        steps: of the optimizer.
        tokens_per_step: tokens a step sees, in passes of `context` (the last multiple at or above it).
        context: tokens of a pass, one sequence.
        loss: "kl" or "lm".
        train: "all-attention" or "lora".
        lr: learning rate of AdamW, constant.
        ema: codebooks follow; False freezes them.
        decay: of the moving average, a step.
        commitment: weight of the commitment term.
        checkpointing: run layers again in the backward pass instead of keeping their activations.
        rank: of lora.

    Raises:
        InputError: a value out of its range.
    """

    steps: int = 120
    tokens_per_step: int = 512
    context: int = 512
    loss: str = "kl"
    train: str = "all-attention"
    lr: float = 1e-5
    ema: bool = True
    decay: float = DECAY
    commitment: float = 0.0
    checkpointing: bool = False
    rank: int = 16

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("tokens_per_step", 2), ("context", 2), ("rank", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{_option(name)} of at least {least}", str(getattr(self, name)), "raise it")
        for name, known in (("loss", LOSSES), ("train", KINDS)):
            if getattr(self, name) not in known:
                raise InputError(f"{_option(name)} among {', '.join(known)}", repr(getattr(self, name)), "choose one of these")
        if not 0 < self.lr < math.inf:
            raise InputError("--lr above 0", f"{self.lr:g}", "the paper takes 1e-5")
        if not 0 <= self.commitment < math.inf:
            raise InputError("--commitment of at least 0", f"{self.commitment:g}", "the paper takes 0")

    @property
    def passes(self) -> int:
        """Passes a step: gradients of so many sequences are accumulated."""
        return -(-self.tokens_per_step // self.context)


@dataclass(frozen=True)
class Finetuned:
    """Result of `finetune`.

    Attributes:
        model: the one that was given, changed.
        codecs: its codecs.
        curve: a row a step: step, loss (without the commitment term), commitment, key and value distortion, seconds.
    """

    model: Any
    codecs: CodecSet
    curve: list[dict[str, float]]

    def save(self, folder: str | Path, tokenizer: Any) -> None:
        """Write a transformers model folder, the codec in `codec/`, the curve as JSON lines and (with matplotlib) a picture.

        Raises:
            InputError: `folder` exists and is not empty, or its parent does not exist.
        """
        with replacing_folder(Path(folder)) as fresh:
            self.model.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
            self.codecs.save(fresh / CODEC)
            (fresh / CURVE).write_text("".join(json.dumps(row) + "\n" for row in self.curve))
            losses = {self.codecs.info["finetune"]["loss"]: [row["loss"] for row in self.curve]}
            try:
                plot_losses(losses, fresh / PLOT)
            except ImportError:
                print("kvfold: no picture without matplotlib: pip install kvfold[plot]", file=sys.stderr)


def finetune(
    model: Any,
    tokenizer: Any,
    codecs: CodecSet,
    texts: Texts,
    settings: FinetuneSettings | None = None,
    *,
    seed: int = 0,
    quiet: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Finetuned:
    """Train `model`'s attention and `codecs`' codebooks for each other.

    Args:
        model, tokenizer: from transformers, float32 or bfloat16. The model is changed in place (in eval mode: no dropout).
        codecs: residual codecs of this model; they stay as they are, the result has new ones.
        texts: what to train on: text, files (`Path`) or `Source`s; read as often as the steps need.
        settings: None for the defaults.
        seed: of the order of sequences and of lora's start.
        quiet: nothing on standard error.
        stop: asked after every step; True ends training there.

    Raises:
        InputError: wrong settings, codecs of another model or method, no text, a model that cannot be trained, a loss that
            is not finite. After this and any other exception the model's weights are what they were.
        UnsupportedModelError: a model whose cache cannot be compressed.
    """
    settings = settings or FinetuneSettings()
    codecs.spec.require_same(model_spec(model))
    kinds = {codec.kind for codec in (*codecs.keys, *codecs.values) if codec is not None}
    if ResidualCodec.kind not in kinds or kinds - {ResidualCodec.kind, IdentityCodec.kind}:
        raise InputError("a residual codec", f"method {codecs.method!r}", "calibrate with --codec rvq or rvq-paper")
    if settings.context > codecs.spec.max_positions:
        raise InputError(f"--context of at most the model's {codecs.spec.max_positions}", str(settings.context), "lower it")
    device = input_device(model)
    stream = TextStream(tokenizer, sources_of(texts), settings.context)
    sequences = _shuffled(stream, torch.Generator().manual_seed(seed))
    cache = StraightThroughCache(codecs.to(device), settings.commitment > 0)
    coded = [side for side in cache.sides() if isinstance(side.codec, ResidualCodec)]
    books = [EmaBooks(side.codec.tensors()["codebooks"], settings.decay) for side in coded] if settings.ema else []
    curve: list[dict[str, float]] = []
    training = model.training
    model.eval()
    start = time.monotonic()
    with ExitStack() as undo:
        undo.callback(model.train, training)
        weights = undo.enter_context(trainable(model, settings.train, settings.lr, settings.rank, seed))
        if not quiet:
            _say_cost(weights, settings)
        undo.enter_context(hooked(model, lambda: cache))
        if settings.checkpointing:
            undo.enter_context(checkpointed(model))
        step = undo.enter_context(Progress("finetuning", settings.steps, quiet))
        for number in range(1, settings.steps + 1):
            for side in cache.sides():
                side.forget()
            losses = [_accumulate(model, weights, cache, next(sequences).to(device), settings) for _ in range(settings.passes)]
            loss, commitment = (sum(column) / settings.passes for column in zip(*losses, strict=True))
            if not math.isfinite(loss + commitment):
                raise InputError("a finite loss", f"{loss:g} in step {number}", "lower --lr")
            weights.step()
            for side, own in zip(coded, books, strict=settings.ema):
                _follow(side, own, first=number == 1)
            seconds = round(time.monotonic() - start, 2)
            curve.append({"step": number, "loss": loss, "commitment": commitment, **_means(cache), "seconds": seconds})
            step(f"loss {loss:.4f}")
            if stop():
                break
    keys, values = cache.coded()
    told = {**asdict(settings), "steps": len(curve), "seed": seed}
    info = {**codecs.info, "distortion": cache.distortion(), "finetune": told}
    return Finetuned(model, replace(codecs, keys=keys, values=values, info=info), curve)


def _accumulate(
    model: Any, weights: Weights, cache: StraightThroughCache, ids: Tensor, settings: FinetuneSettings
) -> tuple[float, float]:
    """Add the gradient of one sequence `[T]`; loss and commitment term, in nats a token and as a mean square."""
    inputs = ids[None]
    coded = model(input_ids=inputs, use_cache=True).logits[0]
    if settings.loss == "lm":
        loss = torch.nn.functional.cross_entropy(coded[:-1].float(), ids[1:])
    else:
        loss = Divergence.apply(coded, weights.original_model(input_ids=inputs, use_cache=False).logits[0])
    commitment = sum(cache.commitments, loss.new_zeros(())) / max(1, len(cache.commitments))
    ((loss + settings.commitment * commitment) / settings.passes).backward()
    weights.collect()
    return float(loss.detach()), float(commitment.detach())


def _follow(side: CodedSide, books: EmaBooks, first: bool) -> None:
    """Move one side's codebooks towards what the step's passes asked of them.

    The paper starts with a count of 1, which large steps soon outweigh. These books were fitted already: they start with a
    step's mean count, so that a step moves them by `1 - decay`.
    """
    assert side.counts is not None
    assert side.sums is not None
    if first:
        share = side.counts.mean(1).clamp_min(1.0)
        books.counts.mul_(share[:, None])
        books.sums.mul_(share[:, None, None])
    books.update(side.counts, side.sums)
    codec = side.codec
    assert isinstance(codec, ResidualCodec)
    side.codec = codec.with_codebooks(books.tables)
    books.tables.copy_(side.codec.codebooks)  # the passes to come use what is saved


def _means(cache: StraightThroughCache) -> dict[str, float]:
    pairs = [pair for pair in cache.distortion() if pair is not None]
    keys, values = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    return {"key_distortion": keys, "value_distortion": values}


def _shuffled(stream: TextStream, generator: torch.Generator) -> Iterator[Tensor]:
    """Sequences `[T]` of the stream without their padding, each drawn from the next `_SHUFFLE`."""
    held: list[Tensor] = []
    for packed in stream:
        ids = packed.ids[packed.mask]
        if len(ids) > 1:
            held.append(ids)
        elif stream.epoch and not held:
            raise InputError("text of at least 2 tokens", "1", "give more text")
        if len(held) == _SHUFFLE:
            yield held.pop(int(torch.randint(len(held), (), generator=generator)))


def _say_cost(weights: Weights, settings: FinetuneSettings) -> None:
    tokens = settings.steps * settings.passes * settings.context
    passes = "2 forward and 1 backward" if settings.loss == "kl" else "1 forward and 1 backward"
    extra = sum(16 * t.numel() + t.numel() * t.element_size() for t in weights.live.values()) / 2**20
    print(
        f"finetuning {weights.numbers:,} numbers ({settings.train}) by {settings.loss}: {settings.steps} steps of "
        f"{settings.passes} x {settings.context} tokens, {tokens:,} in all, each in {passes} passes; "
        f"teacher and optimizer take {extra:.0f} MiB",
        file=sys.stderr,
    )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
