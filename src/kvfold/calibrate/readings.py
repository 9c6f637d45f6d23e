"""What calibration reads off a model and its text, kept so that several calibrations share the passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Readings:
    """Of one model. A calibration that finds its reading here goes on as if it had made it: same result, same generator."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], tuple[Any, Tensor]] = {}

    def get(self, what: tuple[Any, ...], windows: Sequence[Tensor], generator: torch.Generator, make: Callable[[], Any]) -> Any:
        """`make()`, or what it returned when it was last asked for by `what`, of the same windows from the same generator."""
        key = (*what, *(window.numpy().tobytes() for window in (*windows, generator.get_state())))
        if key not in self._kept:
            self._kept[key] = make(), generator.get_state()
        made, state = self._kept[key]
        generator.set_state(state)
        return made
