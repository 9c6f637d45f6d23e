"""`CodeStore` against plain concatenation; poisoned memory shows any read of room not yet written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfold.cache.store import CodeStore
from kvfold.codes import Codes


def codes(tokens: int, batch: int = 2) -> Codes:
    fields = {
        "codes": torch.randint(255, (batch, 3, tokens, 5), dtype=torch.uint8),
        "scale": torch.rand(batch, 3, tokens, 1).half(),
    }
    return Codes(fields)


def joined(first: Codes | None, second: Codes) -> Codes:
    if first is None:
        return second
    return Codes({name: torch.cat((first.fields[name], tensor), 2) for name, tensor in second.fields.items()})


def assert_same(store: CodeStore, expected: Codes | None) -> None:
    got = store.codes()
    assert (got is None) == (expected is None)
    if got is not None and expected is not None:
        assert got.fields.keys() == expected.fields.keys()
        assert all(torch.equal(got.fields[name], tensor) for name, tensor in expected.fields.items())
        assert store.tokens == got.tokens == expected.tokens


VERBS = st.lists(st.tuples(st.sampled_from(["append", "append", "crop", "select"]), st.integers(0, 400)), max_size=12)


@given(verbs=VERBS, limit=st.sampled_from([None, 0, 100, 600]), seed=st.integers(0, 99))
def test_the_store_holds_what_concatenation_would(verbs: list[tuple[str, int]], limit: int | None, seed: int) -> None:
    torch.manual_seed(seed)
    store, expected, batch, most = CodeStore(limit), None, 2, 0
    for verb, count in verbs:
        if verb == "append":
            new = codes(count, batch)
            store.append(new)
            expected = joined(expected, new)
        elif verb == "crop":
            store.crop(count)
            expected = None if expected is None else expected.slice(0, count)
        elif expected is not None:
            rows = torch.tensor([1, 0, 1])[: 2 + count % 2] if batch == 2 else torch.tensor([2, 0])
            store.map(lambda t, rows=rows: t.index_select(0, rows))
            expected, batch = expected.map(lambda t, rows=rows: t.index_select(0, rows)), len(rows)
        assert_same(store, expected)
        most = max(most, store.tokens)
        if limit is not None:
            assert store.allocated_bytes <= max(limit, most) * 3 * 3 * 7  # rows, heads, bytes a token


def test_appending_does_not_touch_what_is_there_and_seldom_allocates() -> None:
    store, places = CodeStore(), set()
    for _ in range(2000):
        store.append(codes(1))
        places.add(store.codes().fields["codes"].data_ptr())
    assert len(places) < 10
    assert store.allocated_bytes <= 1.6 * store.codes().nbytes


def test_reading_copies_nothing() -> None:
    store = CodeStore()
    store.append(codes(10))
    first, second = store.codes(), store.codes()
    assert all(first.fields[name].data_ptr() == second.fields[name].data_ptr() for name in first.fields)


def test_the_store_does_not_hold_on_to_what_was_appended() -> None:
    store, new = CodeStore(), codes(10)
    store.append(new)
    before = store.codes().map(torch.clone)
    new.fields["codes"].zero_()
    assert_same(store, before)


@pytest.mark.parametrize("tokens", [-3, 0])
def test_cropping_to_nothing_leaves_an_empty_store(tokens: int) -> None:
    store = CodeStore()
    store.crop(tokens)
    assert store.codes() is None
    store.append(codes(5))
    store.crop(tokens)
    assert store.codes().tokens == 0


def test_cropping_never_brings_back_tokens() -> None:
    store, new = CodeStore(), codes(8)
    store.append(new)
    store.crop(3)
    store.crop(8)
    assert_same(store, new.slice(0, 3))


def test_an_unused_store_takes_no_memory() -> None:
    assert CodeStore().allocated_bytes == 0
