"""Training of channel shifts and scales block by block, through the blocks that follow (WKVQuant, arXiv 2402.12065).

A block is a decoder layer. Two streams of hidden states run beside each other: the exact one, and one in which the blocks that
are done read their keys and values as the codes say. For block `l` the loss is

    mean |h_l - h'_l|^2 / mean |h_l|^2   +   mean |h_(l + k) - h'_(l + k)| / mean |h_(l + k)|

with `h` what the exact stream leaves block `l` with, or the `k = 5`-th block after it, and `h'` the same of the other stream,
which reads codes in block `l` and is exact after it. The far error is a mean of absolute values, so that few outliers do not
rule it.
Shift and log scale of keys and values are trained by Adam; rounding passes gradients straight on. The last passage is held out:
a block whose loss there did not fall keeps what it had.

Blocks are called as the model calls them, with the arguments of one real pass, so any family whose decoder layers take hidden
states first will do. Cost of a step: `k + 1` blocks forwards and backwards over `CONTEXT` tokens. Memory: hidden states of
`PASSAGES` passages in both streams, one step's activations.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kvfold.codecs import Codec
from kvfold.codecs.artifact import CodecSet
from kvfold.codecs.wkvquant import WkvQuantCodec
from kvfold.config import RopeSpec
from kvfold.errors import InputError
from kvfold.integration.attach import hooked
from kvfold.integration.models import input_device
from kvfold.integration.spec import decoder_layers
from kvfold.integration.stand_in import StandInCache, StandInLayer
from kvfold.progress import Progress

AHEAD = 5  # blocks between the two errors
CONTEXT = 256  # tokens of a passage
PASSAGES = 9  # one of them held out
RATE = 0.01  # of Adam: shifts move by this share of the scale, scales by this share of themselves
Pair = tuple[WkvQuantCodec, WkvQuantCodec]


@dataclass
class Loss:
    """The loss's two parts, scalars."""

    near: Tensor
    far: Tensor

    @property
    def whole(self) -> Tensor:
        return self.near + self.far


class _Layer(StandInLayer):
    """Reads keys and values as `pair` says, exactly without one."""

    def __init__(self, cache: StandInCache, rope: RopeSpec | None) -> None:
        super().__init__(cache, rope)
        self.pair: Pair | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.pair is None:
            return key_states, value_states
        key, value = self.pair
        rotation = self.rotation(slice(None), key_states.device)
        read = key.place(key.through(key.unplace(key_states.float(), rotation)), rotation)
        return read.to(key_states.dtype), value.through(value_states.float()).to(value_states.dtype)


class Blocks:
    """The model's decoder layers, to be called one at a time, all with positions from 0 on.

    Args:
        ids: a passage `[T]`; every hidden state handed over later is of as many tokens.
    """

    def __init__(self, model: Any, codecs: CodecSet, ids: Tensor) -> None:
        found = decoder_layers(model)
        if sorted(found) != list(range(len(codecs.spec.layers))):
            raise InputError("one decoder layer an attention layer", type(model).__name__, "set train_steps=0")
        self._modules = [found[index] for index in range(len(found))]
        self._model, self._device = model, input_device(model)
        cache = StandInCache([])
        ropes = [codecs.spec.rope(i) for i in range(len(found))]
        pre_rope = any(key is not None and key.pre_rope for key in codecs.keys)
        self.layers = [_Layer(cache, rope if pre_rope else None) for rope in ropes]
        cache.layers = list(self.layers)
        self._cache = cache
        self._calls: list[tuple[tuple, dict[str, Any]]] = []
        self.first(ids)

    def __len__(self) -> int:
        return len(self._modules)

    def first(self, ids: Tensor) -> Tensor:
        """Hidden states `[1, T, N]` that enter the first block for token ids `[T]`, from a pass of the whole model."""
        calls: list[tuple[tuple, dict[str, Any]]] = []

        def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            calls.append((args, dict(kwargs)))

        handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in self._modules]
        try:
            with torch.no_grad(), hooked(self._model, lambda: self._cache):
                self._model(input_ids=ids[None].to(self._device), use_cache=True, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()
        self._calls = calls
        args, kwargs = calls[0]
        return args[0] if args else kwargs["hidden_states"]

    def run(self, hidden: Tensor, start: int, stop: int, pair: Pair | None = None) -> Tensor:
        """Hidden states `[1, T, N]` after blocks `start` to `stop - 1`; the first of them reads keys and values by `pair`."""
        for index in range(start, min(stop, len(self))):
            args, kwargs = self._calls[index]
            self.layers[index].pair = pair if index == start else None
            if args:
                args = (hidden, *args[1:])
            else:
                kwargs = {**kwargs, "hidden_states": hidden}
            out = self._modules[index](*args, **kwargs)
            hidden = out[0] if isinstance(out, tuple) else out
            self.layers[index].pair = None
        return hidden

    def loss(self, hidden: Tensor, index: int, pair: Pair, near: Tensor, far: Tensor) -> Loss:
        """Of block `index`, from what enters it in the coded stream and the exact stream's two targets."""
        after = self.run(hidden, index, index + 1, pair)
        later = self.run(after, index + 1, index + 1 + AHEAD)
        return Loss(
            (after - near).float().square().mean() / near.float().square().mean().clamp_min(1e-30),
            (later - far).float().abs().mean() / far.float().abs().mean().clamp_min(1e-30),
        )


def train_blocks(
    model: Any, codecs: CodecSet, windows: Sequence[Tensor], steps: int, generator: torch.Generator, quiet: bool
) -> CodecSet:
    """Codecs like `codecs`, of which those of kind wkvquant have shifts and scales trained for `steps` steps a block.

    Args:
        windows: token ids, each a sequence `[T]` of its own, two or more of at least 2 tokens to hold one out.
        generator: on the CPU, which passages are read.

    Raises:
        InputError: a loss that is not finite, or a model whose layers cannot be told apart.
    """
    passages = _passages(windows, generator)
    training = model.training
    model.eval()
    keys, values = list(codecs.keys), list(codecs.values)
    told: list[list[float] | None] = []
    try:
        blocks = Blocks(model, codecs, passages[0])
        exact = [blocks.first(ids) for ids in passages]
        coded = list(exact)
        with Progress("training blocks", len(blocks), quiet) as step:
            for index in range(len(blocks)):
                with torch.no_grad():
                    near = [blocks.run(hidden, index, index + 1) for hidden in exact]
                    far = [blocks.run(hidden, index + 1, index + 1 + AHEAD) for hidden in near]
                start = _pair(keys[index], values[index])
                pair = start
                losses = None
                if start is not None:
                    targets = list(zip(coded, near, far, strict=True))
                    pair, losses = _train(blocks, index, start, targets, steps, generator)
                    keys[index], values[index] = pair
                told.append(losses)
                with torch.no_grad():
                    coded = [blocks.run(hidden, index, index + 1, pair) for hidden in coded]
                exact = near
                step()
    finally:
        model.train(training)
    if not quiet:
        kept = [losses for losses in told if losses is not None]
        before, after = (sum(losses[i] for losses in kept) / max(len(kept), 1) for i in (0, 1))
        print(f"mean loss of blocks on held-out text: {before:.4f} before training, {after:.4f} after it", file=sys.stderr)
    info = {**codecs.info, "blocks": {"steps": steps, "loss": told}}
    return replace(codecs, keys=tuple(keys), values=tuple(values), info=info)


def _train(
    blocks: Blocks,
    index: int,
    start: Pair,
    passages: list[tuple[Tensor, Tensor, Tensor]],
    steps: int,
    generator: torch.Generator,
) -> tuple[Pair, list[float]]:
    """The better of `start` and what `steps` steps make of it, and the held-out loss before and after.

    `passages` are what enters block `index` in the coded stream and the two targets; the last is held out.
    """
    moves = [torch.zeros(2, *codec.scale.shape, requires_grad=True) for codec in start]  # of shift / scale, and of log scale
    optimizer = torch.optim.Adam(moves, lr=RATE)

    def moved() -> Pair:
        key, value = (
            codec.with_channels(codec.shift + codec.scale * move[0], codec.scale * move[1].exp())
            for codec, move in zip(start, moves, strict=True)
        )
        return key, value

    for number in range(steps):
        entering, near, far = passages[int(torch.randint(max(len(passages) - 1, 1), (), generator=generator))]
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - number / steps)
        with torch.enable_grad():
            found = blocks.loss(entering, index, moved(), near, far).whole
            if not bool(torch.isfinite(found)):
                raise InputError("a finite loss", f"{float(found):g} in step {number + 1}", "set train_steps=0")
            for move, gradient in zip(moves, torch.autograd.grad(found, moves), strict=True):
                move.grad = gradient
        optimizer.step()
    with torch.no_grad():
        after = moved()
        entering, near, far = passages[-1]
        losses = [float(blocks.loss(entering, index, pair, near, far).whole) for pair in (start, after)]
    return (after, losses) if losses[1] < losses[0] else (start, [losses[0], losses[0]])


def _pair(key: Codec | None, value: Codec | None) -> Pair | None:
    return (key, value) if isinstance(key, WkvQuantCodec) and isinstance(value, WkvQuantCodec) else None


def _passages(windows: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Up to `PASSAGES` passages of equal length, from different places."""
    length = min(CONTEXT, max(map(len, windows)))
    pieces = [piece for window in windows for piece in window.split(length) if len(piece) == length]
    order = torch.randperm(len(pieces), generator=generator)[:PASSAGES]
    return [pieces[int(i)] for i in order]
