"""`Positions` against a plain tensor of positions and a list of regimes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvfold.cache.positions import Positions
from kvfold.errors import InputError

SWITCH = 30


class Model:
    """The same verbs on positions `[B, T]` written out."""

    def __init__(self, positions: Tensor) -> None:
        self.positions = positions
        self.regimes: list[int] = []

    def append(self, new: Tensor) -> None:
        self.positions = torch.cat((self.positions, new), 1)
        self.regimes += [int(new.max() >= SWITCH)] * new.shape[1]


def check(tested: Positions, model: Model, data: st.DataObject) -> None:
    length = model.positions.shape[1]
    assert tested.length == length
    if not length:
        return
    start = data.draw(st.integers(0, length - 1))
    stop = data.draw(st.integers(start + 1, length))
    assert torch.equal(tested.slots(start, stop).long(), model.positions[:, start:stop])
    pieces = tested.regimes(start, stop)
    assert [regime for a, b, regime in pieces for _ in range(a, b)] == model.regimes[start:stop]
    assert [a for a, _, _ in pieces] == [start, *(b for _, b, _ in pieces[:-1])]
    assert all(first[2] != second[2] for first, second in itertools.pairwise(pieces))


def walk(data: st.DataObject, start: Tensor, follow) -> Positions:
    """Random verbs on both; `follow(model, n)` gives the next `n` positions."""
    tested, model = Positions(SWITCH), Model(start[:, None][:, :0])
    for verb in data.draw(st.lists(st.sampled_from(["append", "append", "crop", "select", "repeat", "restore"]), max_size=12)):
        batch, length = model.positions.shape
        if verb == "append":
            new = follow(model, data.draw(st.integers(1, 9)))
            tested.announce(new)
            tested.commit(length + new.shape[1], batch)
            model.append(new)
        elif verb == "crop":
            keep = data.draw(st.integers(0, length))
            tested.crop(keep)
            model.positions, model.regimes = model.positions[:, :keep], model.regimes[:keep]
        elif verb == "select":
            rows = torch.tensor(data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=4)))
            tested.map_batch(lambda t, rows=rows: t.index_select(0, rows))
            model.positions = model.positions[rows]
        elif verb == "repeat":
            tested.map_batch(lambda t: t.repeat_interleave(2, 0))
            model.positions = model.positions.repeat_interleave(2, 0)
        else:
            state = tested.state()
            tested = Positions(SWITCH)
            tested.restore(state)
        check(tested, model, data)
    return tested


@given(data=st.data(), batch=st.integers(1, 3))
def test_any_positions_in_any_chunks_come_back(data: st.DataObject, batch: int) -> None:
    def follow(model: Model, count: int) -> Tensor:
        rows = st.lists(st.integers(0, 40), min_size=count, max_size=count)
        return torch.tensor([data.draw(rows) for _ in range(len(model.positions))])

    walk(data, torch.zeros(batch, dtype=torch.int64), follow)


def padded(pads: Tensor, slots: Tensor, padding: int) -> Tensor:
    """Positions of left-padded rows: `padding` under the padding, then 0, 1, 2, ..."""
    positions = slots - pads[:, None]
    return torch.where(positions < 0, padding, positions)


@given(
    pads=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    chunks=st.lists(st.integers(1, 20), min_size=1, max_size=40),
    padding=st.sampled_from([0, 1]),
    data=st.data(),
)
def test_left_padded_rows_take_a_few_runs_however_they_come(
    pads: list[int], chunks: list[int], padding: int, data: st.DataObject
) -> None:
    tested, model, rows = Positions(SWITCH), Model(torch.zeros(len(pads), 0, dtype=torch.int64)), torch.tensor(pads)
    for chunk in chunks:
        start = tested.length
        new = padded(rows, torch.arange(start, start + chunk), padding)
        tested.announce(new)
        tested.commit(start + chunk, len(pads))
        model.append(new)
    check(tested, model, data)
    assert len(tested.state()["runs"]) <= 2 * len(set(pads)) + 2


def test_token_by_token_takes_as_few_runs_as_at_once() -> None:
    positions = padded(torch.tensor([0, 50, 90]), torch.arange(200), 0)
    whole, single = Positions(), Positions()
    whole.announce(positions)
    whole.commit(200, 3)
    for slot in range(200):
        single.announce(positions[:, slot : slot + 1])
        single.commit(slot + 1, 3)
    assert torch.equal(single.slots(0, 200), whole.slots(0, 200))
    assert len(whole.state()["runs"]) <= 4
    assert len(single.state()["runs"]) <= 8


def test_positions_told_once_hold_for_every_row_and_every_layer() -> None:
    tested = Positions()
    tested.announce(torch.arange(5)[None])
    for _ in range(3):  # layers
        tested.commit(5, 2)
    assert tested.slots(1, 4).tolist() == [[1, 2, 3], [1, 2, 3]]
    assert tested.slots(0, 5).dtype == torch.int32


@pytest.mark.parametrize("announced", [None, 4, 6])
def test_tokens_without_told_positions_are_refused(announced: int | None) -> None:
    tested = Positions()
    if announced is not None:
        tested.announce(torch.arange(announced)[None])
    with pytest.raises(InputError, match="attach"):
        tested.commit(5, 1)
    assert tested.length == 0


@pytest.mark.parametrize("forget", ["commit", "crop", "reset"])
def test_positions_are_used_once(forget: str) -> None:
    tested = Positions()
    tested.announce(torch.arange(3)[None])
    {"commit": lambda: tested.commit(3, 1), "crop": lambda: tested.crop(0), "reset": tested.reset}[forget]()
    with pytest.raises(InputError):
        tested.commit(tested.length + 3, 1)


def test_a_pass_beyond_the_switch_length_is_of_the_second_regime() -> None:
    tested = Positions(4)
    for first, last in ((0, 3), (3, 6), (6, 7)):
        tested.announce(torch.arange(first, last)[None])
        tested.commit(last, 1)
    assert tested.regimes(0, 7) == [(0, 3, 0), (3, 7, 1)]
    assert tested.regimes(4, 6) == [(4, 6, 1)]
    tested.crop(3)
    tested.announce(torch.tensor([[3]]))
    tested.commit(4, 1)
    assert tested.regimes(0, 4) == [(0, 4, 0)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_what_was_told_may_be_overwritten_later(dtype: torch.dtype) -> None:
    told = torch.arange(6, dtype=dtype)[None]
    tested = Positions()
    tested.announce(told)
    tested.commit(6, 1)
    told.fill_(99)
    assert tested.slots(0, 6).tolist() == [[0, 1, 2, 3, 4, 5]]


def test_reset_and_an_empty_state_are_a_new_start() -> None:
    tested = Positions()
    tested.announce(torch.arange(6)[None])
    tested.commit(6, 1)
    tested.reset()
    assert (tested.length, tested.state(), tested.regimes(0, 9)) == (0, {}, [])
    tested.restore(tested.state())
    assert tested.length == 0
