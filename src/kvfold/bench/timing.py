"""Medians of several ways to do one thing, taken in turn: what disturbs the machine disturbs all of them.

Each timed run directly follows one that is not timed, so that caches and clock speed are those of the way itself and not of
the one before it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def medians(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Milliseconds of each way, the median of `repeats` rounds."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            run()
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(each) for name, each in times.items()}
