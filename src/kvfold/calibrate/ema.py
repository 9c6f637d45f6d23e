"""Learning codebooks from a stream of text by exponential moving average (arXiv 2410.15704, sections 3 and 4).

From k-means on the first tokens, every step runs a batch of packed sequences through the model, one at a time; as keys and
values of a layer pass, they are coded and only counts and sums per codeword are kept (`codecs/ema.py`). After the batch the
statistics of all processes are summed and the codebooks move. The paper takes batches of 65,536 tokens, packed to 8,192,
and about 150 steps.

Cost of a step: a forward pass over the batch and `2 * stages * codebook_size * group` multiply-adds a group vector. Memory
beyond the model: one layer's K and V of one sequence, and about `16 * stages * codebook_size * group` bytes a quantizer.
The codebooks depend on text, settings and seed, not on interruptions, and on the number of processes only by rounding.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold import distributed
from kvfold.calibrate.checkpoint import Checkpoint
from kvfold.calibrate.learned import LearnedSide
from kvfold.calibrate.sources import Source
from kvfold.calibrate.stream import TextStream, first_windows
from kvfold.codecs.artifact import CodecSet
from kvfold.codecs.ema import DECAY, EPS
from kvfold.distributed import World
from kvfold.errors import InputError
from kvfold.integration.capture import CaptureCache, capturing
from kvfold.integration.models import input_device
from kvfold.progress import Progress

BATCH_TOKENS = 65536
EVERY = 10


@dataclass(frozen=True)
class Ema:
    """How `calibrate` goes on from k-means.

    Attributes:
        steps: updates of the codebooks.
        batch_tokens: tokens of a step over all processes, in whole sequences.
        decay, eps: see `EmaBooks`.
        reseed: a codeword used less than this share of the mean use moves to a random vector; 0 moves none.
        checkpoint: folder for checkpoints and the loss curve, or None.
        every: steps from one checkpoint to the next.
        resume: go on from the checkpoint, if there is one.
    """

    steps: int
    batch_tokens: int = BATCH_TOKENS
    decay: float = DECAY
    eps: float = EPS
    reseed: float = 0.0
    checkpoint: str | Path | None = None
    every: int = EVERY
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_tokens", "every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} of at least 1", str(getattr(self, name)), f"set {name} to a positive number")
        if not 0 <= self.reseed < 1:
            raise InputError("reseed from 0 to below 1", f"{self.reseed:g}", "0 moves no codeword, 0.01 is cautious")
        if self.resume and self.checkpoint is None:
            raise InputError("a checkpoint folder to resume from", "none", "set checkpoint, or leave out resume")


class _Run:
    """The state of a calibration between steps, and the way from one to the next."""

    def __init__(self, blank: CodecSet, ema: Ema, stream: TextStream, world: World, facts: dict[str, Any], quiet: bool) -> None:
        self.blank, self.ema, self.stream, self.world, self.quiet = blank, ema, stream, world, quiet or world.rank > 0
        self.sequences = ema.batch_tokens // stream.context
        self.sides = {
            index: [
                LearnedSide(f"{index}.{side}", codec, ema.decay, ema.eps, ema.reseed)
                for side, codec in (("key", key), ("value", value))
                if codec is not None
            ]
            for index, (key, value) in enumerate(zip(blank.keys, blank.values, strict=True))
        }
        self.every_side = [side for pair in self.sides.values() for side in pair]
        self.seed = int(blank.info["seed"])
        self.config = {
            "method": blank.method,
            "settings": blank.settings,
            "model": blank.spec.fingerprint(),
            "seed": self.seed,
            **{name: getattr(ema, name) for name in ("decay", "eps", "reseed")},
            "context": stream.context,
            "sequences": self.sequences,
            **facts,
        }
        self.checkpoint = None if ema.checkpoint is None or world.rank else Checkpoint(Path(ema.checkpoint))
        self.state: dict[str, Any] = {"step": 0, "tokens": 0, "position": stream.position(), "info": {}, "last": {}}
        self.saved = self.settled = False

    def begin(self, start: Callable[[], CodecSet]) -> None:
        """Codebooks and place from the checkpoint, or from `start`, the same in all processes."""
        if self.world.rank == 0:
            header = self._to_resume()
            self._announce(0 if header is None else header["step"])
            if header is None:
                fitted = start()
                for index, pair in self.sides.items():
                    for side, codec in zip(pair, (fitted.keys[index], fitted.values[index]), strict=False):
                        side.start(codec)
                self.state["info"] = fitted.info
            else:
                assert self.checkpoint is not None
                tensors = self.checkpoint.tensors(header)
                for side in self.every_side:
                    side.restore(tensors)
                self.state = {name: header[name] for name in self.state}
        self.state = self.world.spread_json(self.state)
        self.world.spread(tensor for side in self.every_side for tensor in side.books.state().values())
        self.stream.seek(self.state["position"])
        self.settled = True
        if self.checkpoint is not None:
            self.checkpoint.cut_curve(self.state["step"])
            self._save()

    def learn(self, model: Any) -> None:
        """All steps that are left. Interrupted or failed, it leaves a checkpoint of the last whole step."""
        pre_rope = self.every_side[0].codec.pre_rope
        cache = CaptureCache(self.blank.spec, pre_rope, self._take)
        left = self.ema.steps - self.state["step"]
        try:
            with capturing(model, cache) as read, Progress("learning codebooks", left, self.quiet) as progress:
                for _ in range(left):
                    self._step(cache, read)
                    if self.state["step"] % self.ema.every == 0:
                        self._save()
                    progress()
        finally:
            if self.settled:
                self._save()
            if self.checkpoint is not None and self.state["step"] < self.ema.steps:
                print(f"kvfold: stopped; --resume goes on from {self.checkpoint.folder}", file=sys.stderr)

    def result(self, model: Any, window: Tensor) -> CodecSet:
        """The codecs as they are now, with their distortion on `window`, ids `[T]`; the same in all processes."""
        spec = self.blank.spec
        keys, values = (
            tuple(pair[number].finished(spec.kv_heads) if pair else None for pair in self.sides.values()) for number in (0, 1)
        )
        learned = {name: self.config[name] for name in ("decay", "eps", "reseed", "context", "sequences")}
        learned = {"steps": self.state["step"], "tokens": self.state["tokens"], **learned, **self.state["last"]}
        codecs = replace(self.blank, keys=keys, values=values)
        distortion = _distortion(model, codecs, window) if self.world.rank == 0 else []
        info = self.world.spread_json({**self.state["info"], "distortion": distortion, "ema": learned})
        return replace(codecs, info=info)

    def _take(self, layer: int, keys: Tensor, values: Tensor) -> None:
        for side, x in zip(self.sides[layer], (keys, values), strict=False):
            side.add(x)

    def _step(self, cache: CaptureCache, read: Callable[[Tensor], None]) -> None:
        began = time.monotonic()
        tokens = torch.tensor(0)
        for side in self.every_side:
            side.forget()
        for packed in self.stream.batch(self.sequences):
            ids = packed.ids[packed.mask]  # padding is at the end, where no token sees it: left out altogether
            cache.choose(torch.arange(len(ids)))
            read(ids)
            tokens += len(ids)
        self.world.sum([tokens, *(tensor for side in self.every_side for tensor in side.statistics)])
        self.settled = False
        errors = [side.update() for side in self.every_side]
        last = {"key_mse": _mean(errors[::2]), "value_mse": _mean(errors[1::2]), "moved": self._reseed()}
        step, total = self.state["step"] + 1, self.state["tokens"] + int(tokens)
        if self.checkpoint is not None:
            seconds = round(time.monotonic() - began, 3)
            self.checkpoint.append({"step": step, "tokens": total, "epoch": self.stream.epoch, **last, "seconds": seconds})
        self.state.update(step=step, tokens=total, position=self.stream.position(), last=last)
        self.settled, self.saved = True, False

    def _reseed(self) -> int:
        """Move dead codewords of all sides, in the process that read the first sequence of the step, and tell the others."""
        if not self.ema.reseed:
            return 0
        owner, moved = self.state["position"]["sequence"] % self.world.size, torch.tensor(0)
        if self.world.rank == owner:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.state["step"])
            moved += sum(side.reseed(generator) for side in self.every_side)
        self.world.spread([moved, *(t for side in self.every_side for t in side.books.state().values())], owner)
        return int(moved)

    def _announce(self, step: int) -> None:
        if self.quiet:
            return
        left, context = self.ema.steps - step, self.stream.context
        tensors = [t for side in self.every_side for t in (*side.statistics, *side.books.state().values())]
        print(
            f"learning codebooks by moving average: {left} steps of {self.sequences} x {context} tokens, "
            f"{left * self.sequences} passes{' after k-means' if not step else ''}; "
            f"statistics take {sum(t.numel() for t in tensors) * 4 / 2**20:.0f} MiB",
            file=sys.stderr,
        )
        if self.checkpoint is not None:
            print(f"checkpoints every {self.ema.every} steps in {self.checkpoint.folder}", file=sys.stderr)

    def _save(self) -> None:
        if self.checkpoint is not None and not self.saved:
            tensors = {f"{side.name}.{name}": t for side in self.every_side for name, t in side.books.state().items()}
            self.checkpoint.save({**self.state, "steps": self.ema.steps, "config": self.config}, tensors)
            self.saved = True

    def _to_resume(self) -> dict[str, Any] | None:
        """Header of the checkpoint to go on from, if there is one and it is wanted."""
        header = self.checkpoint.header() if self.checkpoint is not None else None
        if header is None:
            return None
        if not self.ema.resume:
            if header["step"] >= header["steps"]:
                return None
            came = f"one of step {header['step']} of {header['steps']} in {self.ema.checkpoint}"
            raise InputError("no unfinished checkpoint", came, "add --resume to go on from it, or remove the folder")
        for name, mine in self.config.items():
            if header["config"].get(name) != mine:
                expected = f"{name} {header['config'].get(name)}, as in the checkpoint"
                raise InputError(expected, str(mine), "resume with the same options, or take another --checkpoint folder")
        if header["step"] > self.ema.steps:
            raise InputError(f"at least {header['step']} steps, already taken", str(self.ema.steps), "raise --ema-steps")
        return header


def _distortion(model: Any, codecs: CodecSet, window: Tensor) -> list[list[float] | None]:
    """Mean squared error over mean square of keys and values of `window`, layer by layer; None where a layer is exact."""
    found: list[list[float] | None] = [None] * len(codecs.keys)
    pairs = list(zip(codecs.keys, codecs.values, strict=True))

    def take(layer: int, keys: Tensor, values: Tensor) -> None:
        key, value = pairs[layer]
        if key is not None and value is not None:
            found[layer] = [codec.to(x.device).distortion(x) for codec, x in ((key, keys), (value, values))]

    cache = CaptureCache(codecs.spec, any(key is not None and key.pre_rope for key in codecs.keys), take)
    cache.choose(torch.arange(len(window)))
    with capturing(model, cache) as read:
        read(window)
    return found


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def learn(
    model: Any,
    tokenizer: Any,
    sources: list[Source],
    blank: CodecSet,
    start: Callable[[list[Tensor]], CodecSet],
    ema: Ema,
    *,
    tokens: int,
    context: int,
    quiet: bool,
) -> CodecSet:
    """Learn the codebooks of `blank`, a set of unfitted residual codecs; `calibrate` is the way in.

    Args:
        start: k-means on windows of tokens; called with the first `tokens` tokens of the text, by process 0.
        context: tokens of a sequence, at most the model's and `ema.batch_tokens`.

    Raises:
        InputError: as `calibrate`; a checkpoint of another run, or one not finished and not resumed; fewer sequences in a
            batch than processes.
    """
    context = min(context, blank.spec.max_positions, ema.batch_tokens)
    with distributed.joined(input_device(model)) as world:
        if ema.batch_tokens // context < world.size:
            fix = "raise --ema-batch-tokens, lower --context, or start fewer processes"
            raise InputError(f"a batch of {world.size} sequences of {context} tokens", f"{ema.batch_tokens} tokens", fix)
        stream = TextStream(tokenizer, sources, context, world.rank, world.size)
        run = _Run(blank, ema, stream, world, {"tokens": tokens, "sources": [s.identity() for s in sources]}, quiet)
        run.begin(lambda: start(first_windows(tokenizer, sources, tokens, context)))
        run.learn(model)
        return run.result(model, first_windows(tokenizer, sources, context, context)[0])
