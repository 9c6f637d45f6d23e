"""Quality at a fixed amount of memory: how far a cache that may not grow is from the exact model, as its context grows.

For every context, windows of text are read in passes of `CHUNK` tokens through one cache with a memory limit, and the
next-token distributions of the last `TAIL` tokens are compared with those of the exact model. Under the limit the oldest codes
have lost stages (`kvfold/cache/past.py`); a second cache of the same codec without a limit shows what that costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kvfold.cache.cache import SINKS, WINDOW, CacheReport
from kvfold.codecs.artifact import CodecSet
from kvfold.compat import cache_argument
from kvfold.errors import CacheFullError, InputError
from kvfold.evaluate.evaluate import eval_windows
from kvfold.integration.attach import attach
from kvfold.progress import Progress

CHUNK = 512
TAIL = 256
CONTEXTS = (1024, 2048, 4096, 7680)


@dataclass(frozen=True)
class BudgetRow:
    """One context.

    Attributes:
        kl_limited, kl_free: KL from the exact model's distributions to those read through the cache with and without the limit,
            mean over the last tokens, nats; `kl_limited` is None if the context does not fit the limit.
        bits_limited, bits_free: bits per element of the caches at the end, exact tokens counted.
        bytes_limited, bytes_free, bytes_bf16: bytes of the tokens alive.
    """

    context: int
    kl_limited: float | None
    kl_free: float
    bits_limited: float | None
    bits_free: float
    bytes_limited: int | None
    bytes_free: int
    bytes_bf16: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def measure_budget(
    model: Any,
    tokenizer: Any,
    codecs: CodecSet,
    text: Sequence[str] | str,
    max_bytes: int,
    *,
    contexts: Sequence[int] = CONTEXTS,
    windows: int = 2,
    sinks: int = SINKS,
    window: int = WINDOW,
    quiet: bool = False,
) -> list[BudgetRow]:
    """Measure every context.

    Args:
        max_bytes: what the limited cache may take.
        windows: of text, a context; means are over them.

    Raises:
        InputError: no text, a context of less than `TAIL + 1` tokens or more than the model's, codecs of another model.
    """
    if min(contexts) <= TAIL:
        raise InputError(f"contexts above {TAIL}", str(min(contexts)), "raise it")
    rows = []
    with Progress("measuring", len(contexts) * windows, quiet) as step:
        for context in contexts:
            read = eval_windows(tokenizer, text, context, windows, codecs.spec.max_positions)
            if len(read[0]) < context:
                raise InputError(f"text of {context} tokens", f"{len(read[0])}", "give more text, or smaller contexts")
            losses: dict[bool, list[float]] = {True: [], False: []}
            reports: dict[bool, CacheReport] = {}
            for ids in read:
                inputs = ids[None].to(model.device)
                exact = model(input_ids=inputs, use_cache=False).logits[0, -TAIL:].float().log_softmax(-1)
                for limited in (True, False):
                    limit = max_bytes if limited else None
                    try:
                        coded, reports[limited] = _read(model, codecs, inputs, limit, sinks, window)
                    except CacheFullError:
                        continue
                    losses[limited].append(float((exact.exp() * (exact - coded)).sum(1).mean()))
                step()
            free, small = reports[False], reports.get(True)
            rows.append(
                BudgetRow(
                    context,
                    sum(losses[True]) / len(losses[True]) if losses[True] else None,
                    sum(losses[False]) / len(losses[False]),
                    small.bits_per_element if small else None,
                    free.bits_per_element,
                    small.bytes_cache if small else None,
                    free.bytes_cache,
                    free.bytes_bf16,
                )
            )
    return rows


def _read(
    model: Any, codecs: CodecSet, inputs: Tensor, max_bytes: int | None, sinks: int, window: int
) -> tuple[Tensor, CacheReport]:
    """Log-probabilities of the last `TAIL` tokens, and what the cache holds at the end."""
    parts = [*inputs[:, :-TAIL].split(CHUNK, 1), inputs[:, -TAIL:]]
    with attach(model, codecs, sinks=sinks, window=window, max_bytes=max_bytes) as attached:
        cache = attached.new_cache()
        given = {cache_argument(model) or "past_key_values": cache}
        for part in parts:
            logits = model(input_ids=part, use_cache=True, **given).logits
        return logits[0].float().log_softmax(-1), cache.report()
