"""Training of codebooks end to end: the compressed model is to say what the exact one says.

The loss is KL(p || p') over all next tokens, nats a token, with `p` the model reading its cache exactly and `p'` the model
reading every key and value as its codes say. Codewords alone are trained, by Adam with a rate that falls to 0: a decoded
vector is a sum of codewords, so its gradient is theirs; through the choice of codes it passes straight to keys and values
(`integration/straight_through.py`). Codes are searched anew in every step, as the cache will search them.

The last window of the text is held out. Divergence there is measured before and after, and codebooks that became worse are
not kept.

Cost of a step: two forward passes and one backward pass over `CONTEXT` tokens. Memory: the codebooks four times in float32, one
pass's activations, and the logits `[CONTEXT, vocabulary]` three times.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvfold.calibrate.divergence import Divergence, divergences
from kvfold.calibrate.stages import EVERY, Stages
from kvfold.codecs import Codec
from kvfold.codecs.artifact import CodecSet
from kvfold.codecs.residual import ResidualCodec
from kvfold.errors import InputError
from kvfold.integration.attach import hooked
from kvfold.integration.models import input_device, reduced_precision
from kvfold.integration.straight_through import StraightThroughCache
from kvfold.progress import Progress

CONTEXT = 768  # tokens of a step
RATE = 2e-3  # of Adam, for codewords of vectors with a standard deviation of 1
_BETAS = (0.9, 0.99)
_WARM_UP = 5  # steps


def distill(
    model: Any,
    codecs: CodecSet,
    windows: Sequence[Tensor],
    steps: int,
    generator: torch.Generator,
    stages: Stages | None = None,
    quiet: bool = False,
) -> CodecSet:
    """`codecs` with codebooks trained for `steps` steps; `info["distill"]` tells steps and held-out divergence.

    Args:
        windows: token ids `[T]`; the last is held out if there is another.
        generator: on the CPU, of the order of passages.
        stages: keeps every few steps on disk, and knows those of an interrupted run.

    Raises:
        InputError: a loss that is not finite.
    """
    device, training = input_device(model), model.training
    started = codecs.to(device)
    train, held = list(windows[:-1]) or list(windows), windows[-1][:CONTEXT]
    model.eval()
    try:
        (before,) = divergences(model, [started], held)
        trained = _train(model, started, train, steps, generator, stages, quiet)
        (after,) = divergences(model, [trained], held)
    finally:
        model.train(training)
    if not quiet:
        print(f"divergence on held-out text: {before:.4f} before training, {after:.4f} after it", file=sys.stderr)
    kept = trained if after < before else started
    told = {"steps": steps, "divergence_before": before, "divergence_after": after, "kept": after < before}
    return replace(kept.to("cpu"), info={**codecs.info, "distill": told})


def _train(
    model: Any,
    codecs: CodecSet,
    windows: Sequence[Tensor],
    steps: int,
    generator: torch.Generator,
    stages: Stages | None,
    quiet: bool,
) -> CodecSet:
    device = input_device(model)
    keys, values = (_each(side, ResidualCodec.trainable) for side in (codecs.keys, codecs.values))
    live = replace(codecs, keys=keys, values=values)
    cache = StraightThroughCache(live, gathering=False)
    tables = [c.codebooks for c in (*live.keys, *live.values) if isinstance(c, ResidualCodec)]
    optimizer = torch.optim.Adam(tables, lr=RATE, betas=_BETAS, eps=1e-10)
    done = _restore(stages.training(), tables, optimizer) if stages is not None and stages.step else 0
    with Progress("training codebooks", steps - done, quiet) as step:
        for number in range(done + 1, steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(number / _WARM_UP, 1 - (number - 1) / steps)
            ids = _passage(windows, generator).to(device)[None]
            with torch.no_grad(), reduced_precision(model):
                exact = model(input_ids=ids, use_cache=False).logits[0]
            with torch.enable_grad(), hooked(model, lambda: cache), reduced_precision(model):
                coded = model(input_ids=ids, use_cache=True).logits[0]
            loss = Divergence.apply(coded, exact)
            if not math.isfinite(float(loss.detach())):
                raise InputError("a finite loss", f"{float(loss):g} in step {number} of training", "set distill_steps=0")
            for table, gradient in zip(tables, torch.autograd.grad(loss, tables), strict=True):
                table.grad = gradient
            optimizer.step()
            if stages is not None and number % EVERY == 0:
                stages.keep(number, steps, _state(tables, optimizer), generator)
            step(f"loss {float(loss.detach()):.4f}")
    rounded = lambda codec: codec.with_codebooks(codec.codebooks.detach())  # noqa: E731
    return replace(codecs, keys=_each(live.keys, rounded), values=_each(live.values, rounded))


def _state(tables: Sequence[Tensor], optimizer: torch.optim.Adam) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for index, table in enumerate(tables):
        own = optimizer.state[table]
        state |= {f"{index}.table": table.detach(), f"{index}.mean": own["exp_avg"], f"{index}.square": own["exp_avg_sq"]}
        state["step"] = own["step"]
    return state


def _restore(state: dict[str, Tensor], tables: Sequence[Tensor], optimizer: torch.optim.Adam) -> int:
    """Take over what `_state` gave; returns the steps done."""
    for index, table in enumerate(tables):
        with torch.no_grad():
            table.copy_(state[f"{index}.table"])
        mean, square = (state[f"{index}.{name}"].to(table.device) for name in ("mean", "square"))
        optimizer.state[table] = {"step": state["step"].clone(), "exp_avg": mean, "exp_avg_sq": square}
    return int(state["step"])


def _each(codecs: Sequence[Codec | None], change: Any) -> tuple[Codec | None, ...]:
    return tuple(change(codec) if isinstance(codec, ResidualCodec) else codec for codec in codecs)


def _passage(windows: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    window = windows[int(torch.randint(len(windows), (), generator=generator))]
    start = int(torch.randint(max(1, len(window) - CONTEXT + 1), (), generator=generator))
    return window[start : start + CONTEXT]
