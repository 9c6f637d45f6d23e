"""`kvfold` whose process 1 dies when it is to read its `DIE_AT`-th batch; run by test_distributed.py under torchrun."""

from __future__ import annotations

import os
import sys

from kvfold.calibrate.stream import Packed, TextStream
from kvfold.cli import main

_batch, _seen = TextStream.batch, [0]


def _dying(self: TextStream, count: int) -> list[Packed]:
    _seen[0] += self.world > 1
    if self.rank == 1 and _seen[0] == int(os.environ["DIE_AT"]):
        os._exit(9)
    return _batch(self, count)


if __name__ == "__main__":
    TextStream.batch = _dying  # type: ignore[method-assign]
    sys.exit(main())
