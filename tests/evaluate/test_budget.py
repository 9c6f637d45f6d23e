"""Quality at a fixed amount of memory (`kvfold/evaluate/budget.py`)."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import tiny_codecs, tiny_model, tiny_tokenizer

import kvfold
from kvfold.calibrate.text import builtin_text
from kvfold.evaluate.budget import BudgetRow, measure_budget

TEXT = builtin_text()[:60]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("CHUNK", 64), ("TAIL", 32)):
        monkeypatch.setattr(f"kvfold.evaluate.budget.{name}", size)
    monkeypatch.setattr("kvfold.cache.cache.LOWERED_TOGETHER", 16)


def rows(max_bytes: int, **how: Any) -> list[BudgetRow]:
    codecs = tiny_codecs("llama", "rvq", stages=6, codebook_size=32)
    sizes: dict[str, Any] = {"contexts": (100, 200, 400), "sinks": 2, "window": 8, "quiet": True, **how}
    return measure_budget(tiny_model("llama"), tiny_tokenizer(), codecs, TEXT, max_bytes, **sizes)


def test_a_limit_costs_nothing_until_it_is_reached_and_then_little_by_little() -> None:
    free = rows(10**9)
    assert [row.context for row in free] == [100, 200, 400]
    assert all(row.kl_limited == row.kl_free and row.bits_limited == row.bits_free for row in free)
    limit = free[1].bytes_free + 20_000  # room for 200 tokens, and for what an allocation rounds up
    limited = rows(limit)
    assert limited[0].kl_limited == limited[0].kl_free
    last = limited[2]
    assert last.bytes_limited is not None
    assert last.bytes_limited <= limit < last.bytes_free
    assert last.kl_limited is not None
    assert last.kl_limited > last.kl_free
    assert last.bits_limited is not None
    assert last.bits_limited < last.bits_free


def test_what_does_not_fit_is_told() -> None:
    small = rows(30_000)
    assert small[2].kl_limited is small[2].bits_limited is small[2].bytes_limited is None
    assert small[2].kl_free > 0


def test_contexts_and_texts_that_cannot_be() -> None:
    with pytest.raises(kvfold.InputError, match="contexts above"):
        rows(10**6, contexts=(20,))
    with pytest.raises(kvfold.InputError, match="--context"):
        rows(10**6, contexts=(100, 100_000))
