"""AsymKV's numbers under a budget (`kvfold/calibrate/search.py`)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import random_ids, tiny_model, tiny_tokenizer

import kvfold
from kvfold.calibrate.calibrate import _blank
from kvfold.calibrate.divergence import divergences
from kvfold.calibrate.search import coarse_to_fine, frontier, search
from kvfold.calibrate.text import builtin_text
from kvfold.codecs import resolve_settings
from kvfold.codecs.artifact import CodecSet
from kvfold.errors import InputError
from kvfold.integration.spec import model_spec

# A tiny model of random weights read through 1 bit says something else altogether, whatever the layer.
WIDE = {"high": 6, "low": 3, "group": 4}
WINDOWS = [random_ids(1, 120, seed)[0] for seed in range(4)]


@functools.cache
def codecs(keys: int, values: int, family: str = "llama") -> CodecSet:
    settings = resolve_settings("asymkv", {**WIDE, "key_layers": keys, "value_layers": values}, 16)
    return _blank(model_spec(tiny_model(family)), "asymkv", settings, {})


def divergence(pair: tuple[int, int]) -> float:
    model = tiny_model("llama")
    return sum(next(divergences(model, [codecs(*pair)], window)) for window in WINDOWS) / len(WINDOWS)


def test_the_frontier_has_no_room_for_more() -> None:
    low, high = (codecs(k, k).bits_per_element for k in (0, 3))
    for budget in (low, low + 0.7, (low + high) / 2, high - 0.1, high, high + 5):
        every = [(k, v) for k in range(4) for v in range(4) if codecs(k, v).bits_per_element <= budget + 1e-9]
        more = lambda a, b: a != b and a[0] >= b[0] and a[1] >= b[1]  # noqa: E731
        assert frontier(codecs, budget) == [p for p in every if not any(more(q, p) for q in every)]


def test_layers_that_stay_exact_are_not_counted() -> None:
    make = functools.partial(codecs, family="gemma3")  # whose first layer is sliding
    assert make(1, 1).bits_per_element == make(0, 0).bits_per_element
    assert frontier(make, make(0, 0).bits_per_element) == [(1, 1)]


def test_a_budget_below_the_low_width_is_refused() -> None:
    with pytest.raises(InputError, match="a budget of at least"):
        frontier(codecs, codecs(0, 0).bits_per_element - 0.1)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.integers(1, 12))
def test_coarse_to_fine_measures_nothing_twice_and_everything_at_a_step_of_1(values: list[float], step: int) -> None:
    asked: list[int] = []

    def measure(indices: Sequence[int]) -> list[float]:
        asked.extend(indices)
        return [values[i] for i in indices]

    found = coarse_to_fine(len(values), measure, step)
    assert len(asked) == len(set(asked))
    assert found == {i: values[i] for i in asked}
    assert {0, len(values) - 1} <= found.keys()
    if step == 1:
        assert found.keys() == set(range(len(values)))


@pytest.mark.parametrize("best", range(31))
def test_coarse_to_fine_finds_the_bottom_of_a_valley(best: int) -> None:
    found = coarse_to_fine(31, lambda indices: [abs(i - best) for i in indices], 4)
    assert min(found, key=lambda i: found[i]) == best
    assert len(found) <= 13


def test_no_pair_within_the_budget_is_better_than_the_chosen_one() -> None:
    budget = (codecs(0, 0).bits_per_element + codecs(3, 3).bits_per_element) / 2
    chosen, found = search(tiny_model("llama"), codecs, budget, WINDOWS, quiet=True)
    every = [(k, v) for k in range(4) for v in range(4) if codecs(k, v).bits_per_element <= budget + 1e-9]
    nats = {pair: divergence(pair) for pair in every}
    assert codecs(*chosen).bits_per_element <= budget
    assert found[chosen] == pytest.approx(nats[chosen], rel=1e-4)
    assert nats[chosen] <= 1.02 * min(nats.values())  # more bits may by chance do harm


def test_calibration_fills_in_the_numbers_and_tells_the_search(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama").train()
    budget = codecs(2, 1).bits_per_element
    settings = {**WIDE, "budget": budget}
    made = kvfold.calibrate(model, tiny_tokenizer(), builtin_text(), "asymkv", tokens=600, context=100, settings=settings)
    keys, values = made.settings["key_layers"], made.settings["value_layers"]
    assert keys + values == 3
    assert made.bits_per_element == budget
    assert [codec.settings()["bits"] for codec in made.keys] == [6 if i < keys else 3 for i in range(3)]
    assert [codec.settings()["bits"] for codec in made.values] == [6 if i < values else 3 for i in range(3)]
    assert {k + v for k, v, _ in made.info["search"]} == {3}
    assert [keys, values] == min(made.info["search"], key=lambda row: row[2])[:2]
    assert f"first {keys} layers and values of {values}" in capsys.readouterr().err
    assert model.training
