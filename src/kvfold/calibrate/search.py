"""AsymKV's two numbers under a budget of bits: what the model says decides (Tao et al., arXiv 2410.13212, section 4).

A pair `(k, v)` is key_layers and value_layers of `codecs/asymkv.py`. Of the pairs whose mean bits fit the budget, only those
are looked at that leave no room for more of either: along that frontier `v` falls as `k` grows. The divergence from the exact
model is measured at about eight of them, then beside the best at half the distance, and so on down to its neighbours.

Windows of the calibration text serve as validation text: integers between minimum and maximum learn nothing from it.

Cost: two passes of `CONTEXT` tokens a pair and window, `WINDOWS` windows; an exact pass a window and round.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from kvfold.calibrate.distill import CONTEXT
from kvfold.calibrate.divergence import divergences
from kvfold.codecs.artifact import CodecSet
from kvfold.errors import InputError
from kvfold.progress import Progress

WINDOWS = 4
_COARSE = 8  # distances that the frontier is cut into at first

Pair = tuple[int, int]


def search(
    model: Any,
    make: Callable[[int, int], CodecSet],
    budget: float,
    windows: Sequence[Tensor],
    quiet: bool = False,
) -> tuple[Pair, dict[Pair, float]]:
    """The pair of least divergence within `budget`, and the divergence of all pairs that were measured.

    Args:
        make: codecs of a pair.
        budget: mean bits per element at most.
        windows: token ids `[T]`; of at most `WINDOWS` of them, the first `CONTEXT` tokens are read.

    Raises:
        InputError: the low width alone takes more than the budget.
    """
    read = [window[:CONTEXT] for window in windows[:: -(-len(windows) // WINDOWS)]]
    pairs = frontier(make, budget)
    training = model.training

    def measure(indices: Sequence[int]) -> list[float]:
        candidates = [make(*pairs[i]) for i in indices]
        totals = [0.0] * len(indices)
        with Progress("choosing layers", len(read) * len(indices), quiet) as step:
            for window in read:
                for place, nats in enumerate(divergences(model, candidates, window)):
                    totals[place] += nats * len(window)
                    step()
        return [total / sum(map(len, read)) for total in totals]

    model.eval()
    try:
        found = coarse_to_fine(len(pairs), measure, -(-len(pairs) // _COARSE))
    finally:
        model.train(training)
    best = min(found, key=lambda index: (found[index], index))
    if not quiet:
        bits = make(*pairs[best]).bits_per_element
        keys, values = pairs[best]
        told = f"keys of the first {keys} layers and values of {values} have the high width"
        print(f"{told}: {bits:.3f} bits, divergence {found[best]:.4f}, best of {len(found)} pairs", file=sys.stderr)
    return pairs[best], {pairs[index]: nats for index, nats in sorted(found.items())}


def frontier(make: Callable[[int, int], CodecSet], budget: float) -> list[Pair]:
    """The pairs within the budget that no other pair within it has more of either than, `k` ascending."""
    layers = len(make(0, 0).keys)

    def bits(keys: int, values: int) -> float:
        return make(keys, values).bits_per_element

    least = bits(0, 0)
    if least > budget + 1e-9:
        raise InputError(f"a budget of at least {least:g} bits", f"{budget:g}", "raise budget, or group, or lower low")
    pairs: list[Pair] = []
    values = layers
    for keys in range(layers + 1):
        while values >= 0 and bits(keys, values) > budget + 1e-9:
            values -= 1
        if values < 0:
            break
        if pairs and pairs[-1][1] == values:
            pairs.pop()  # as many values with fewer keys
        pairs.append((keys, values))
    return pairs


def coarse_to_fine(count: int, measure: Callable[[Sequence[int]], Sequence[float]], step: int) -> dict[int, float]:
    """What `measure` says of indices below `count`: of every `step`-th, then beside the least at half the step, down to 1."""
    found: dict[int, float] = {}

    def look(indices: Sequence[int]) -> None:
        new = sorted({i for i in indices if 0 <= i < count} - found.keys())
        if new:
            found.update(zip(new, measure(new), strict=True))

    look([*range(0, count, step), count - 1])
    while step > 1:
        step = (step + 1) // 2
        best = min(found, key=lambda i: (found[i], i))
        look([best - step, best + step])
    return found
