"""RoPE positions of the cached tokens, once for all layers and in a few bytes.

Positions are what the model was called with: with left padding they differ by row. They rise by one (or stand still,
under padding) for long stretches, so they are kept as runs `first + step * i` and written out when asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvfold.errors import InputError


@dataclass(frozen=True)
class _Run:
    """`length` tokens from slot `start`: position of token i of row b is `first[b] + step[b] * i`."""

    start: int
    length: int
    first: Tensor
    step: Tensor
    regime: int

    def at(self, start: int, stop: int) -> Tensor:
        index = torch.arange(start - self.start, stop - self.start, dtype=self.first.dtype, device=self.first.device)
        return self.first[:, None] + self.step[:, None] * index


class Positions:
    """Positions of slots `0..length-1` for `B` rows.

    A forward pass first `announce`s the positions of its tokens; the first layer that stores them `commit`s them.

    Args:
        switch_length: longrope models use other frequencies once a pass reaches this position; None for others.
    """

    def __init__(self, switch_length: int | None = None) -> None:
        self._switch_length = switch_length
        self.reset()

    def reset(self) -> None:
        self._runs: list[_Run] = []
        self._announced: Tensor | None = None
        self._written: dict[tuple[int, int], Tensor] = {}  # asked for in this pass: all layers ask for the same
        self.length = 0

    def announce(self, positions: Tensor) -> None:
        """Positions `[B or 1, Q]` of the tokens of the forward pass that begins."""
        self._announced = positions

    def commit(self, stop: int, batch: int) -> None:
        """Make sure slots `0..stop-1` have positions, taking the announced ones for those that are new."""
        new = stop - self.length
        if new <= 0:
            return
        announced = self._announced
        if announced is None or announced.shape[1] != new:
            came = "none" if announced is None else f"{announced.shape[1]}"
            raise InputError(
                f"a forward pass that tells the positions of its {new} tokens",
                f"{came}",
                "use the cache inside `with kvfold.attach(model, codecs):`",
            )
        regime = int(self._switch_length is not None and int(announced.max()) + 1 > self._switch_length)
        for run in _runs(announced.expand(batch, -1).to(torch.int32), self.length, regime):
            self._append(run)
        self.length = stop
        self._announced = None
        self.forget()

    def forget(self) -> None:
        """The pass is over, or slots have changed: positions written out are let go of."""
        self._written = {}

    def slots(self, start: int, stop: int) -> Tensor:
        """Positions of slots `start..stop-1`, int32 `[B, stop - start]`; not to be written to."""
        if (start, stop) not in self._written:
            self._written[start, stop] = self._write(start, stop)
        return self._written[start, stop]

    def _write(self, start: int, stop: int) -> Tensor:
        parts = [
            run.at(max(start, run.start), min(stop, run.start + run.length))
            for run in self._runs
            if run.start < stop and run.start + run.length > start
        ]
        return torch.cat(parts, 1)

    def regimes(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """`(start, stop, regime)` pieces that cover the slots `start..stop-1` in order; nearly always one."""
        pieces: list[tuple[int, int, int]] = []
        for run in self._runs:
            a, b = max(start, run.start), min(stop, run.start + run.length)
            if a >= b:
                continue
            if pieces and pieces[-1][2] == run.regime:
                pieces[-1] = (pieces[-1][0], b, run.regime)
            else:
                pieces.append((a, b, run.regime))
        return pieces

    def crop(self, length: int) -> None:
        """Forget all but the first `length` slots."""
        kept = [r for r in self._runs if r.start < length]
        self._runs = [replace(r, length=min(r.length, length - r.start)) for r in kept]
        self.length = min(self.length, length)
        self._announced = None
        self.forget()

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply `function` to the batch axis (0) of what is stored."""
        self._runs = [replace(r, first=function(r.first), step=function(r.step)) for r in self._runs]
        self.forget()

    def state(self) -> dict[str, Tensor]:
        """Everything `restore` needs: `runs` int64 `[R, 3]` (start, length, regime), `first` and `step` `[R, B]`."""
        rows = [[r.start, r.length, r.regime] for r in self._runs]
        if not rows:
            return {}
        first, step = torch.stack([r.first for r in self._runs]), torch.stack([r.step for r in self._runs])
        return {"runs": torch.tensor(rows), "first": first, "step": step}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.reset()
        if state:
            rows = zip(state["runs"].tolist(), state["first"], state["step"], strict=True)
            self._runs = [_Run(start, length, first, step, regime) for (start, length, regime), first, step in rows]
            self.length = sum(run.length for run in self._runs)

    def _append(self, run: _Run) -> None:
        if self._runs:
            last = self._runs[-1]
            if last.length == 1:  # one token has no step yet: take the one that leads on
                last = replace(last, step=run.first - last.first)
            follows = bool((last.at(run.start, run.start + 1)[:, 0] == run.first).all())
            same = run.length == 1 or bool((last.step == run.step).all())
            if follows and same and last.regime == run.regime:
                self._runs[-1] = replace(last, length=last.length + run.length)
                return
        self._runs.append(run)


def _runs(positions: Tensor, slot: int, regime: int) -> list[_Run]:
    """Cut `positions [B, Q]` greedily into runs of constant step 0 or 1 in every row."""
    queries, one = positions.shape[1], torch.ones_like(positions[:, 0])
    if queries == 1:
        return [_Run(slot, 1, positions[:, 0].clone(), one, regime)]
    step = positions.diff(dim=1)
    allowed = ((step == 0) | (step == 1)).all(0).tolist()
    unchanged = [True, *(step[:, 1:] == step[:, :-1]).all(0).tolist()]
    runs, start = [], 0
    for index in range(1, queries + 1):
        joins = index < queries and allowed[index - 1] and (index - 1 == start or unchanged[index - 1])
        if not joins:
            length = index - start
            by = step[:, start].clone() if length > 1 else one
            runs.append(_Run(slot + start, length, positions[:, start].clone(), by, regime))
            start = index
    return runs
