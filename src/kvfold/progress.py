"""Progress of long work: a bar on a terminal, about ten lines in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm


class Progress:
    """`with Progress("fitting", total) as step: ... step()`; writes to standard error.

    `step("loss 1.23")` shows a word on how it goes.
    """

    def __init__(self, label: str, total: int, quiet: bool = False) -> None:
        self._label, self._total, self._quiet = label, total, quiet
        self._done, self._next, self._start = 0, 0.1, time.monotonic()
        self._bar = tqdm(total=total, desc=label) if not quiet and sys.stderr.isatty() else None

    def __call__(self, note: str = "") -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update()
        elif not self._quiet and self._done >= self._next * self._total:
            seconds = time.monotonic() - self._start
            left = seconds / self._done * (self._total - self._done)
            told = f"{self._label}: {self._done}/{self._total}, {seconds:.0f} s, {left:.0f} s left"
            print(f"{told}, {note}" if note else told, file=sys.stderr, flush=True)
            self._next = self._done / self._total + 0.1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
