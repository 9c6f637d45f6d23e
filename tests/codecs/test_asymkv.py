"""What is particular to AsymKV; the search of its numbers is in tests/calibrate/test_search.py."""

from __future__ import annotations

import pytest

from kvfold.codecs import build_codec, resolve_settings
from kvfold.errors import InputError


def widths(**changes: int) -> list[list[int]]:
    settings = resolve_settings("asymkv", changes, 64)
    return [[build_codec("asymkv", side, 64, settings, layer).settings()["bits"] for layer in range(4)] for side in SIDES]


SIDES = ("key", "value")


def test_the_first_layers_have_the_high_width() -> None:
    assert widths(key_layers=3, value_layers=1) == [[2, 2, 2, 1], [2, 1, 1, 1]]
    assert widths(key_layers=0, value_layers=9, high=4, low=3) == [[3, 3, 3, 3], [4, 4, 4, 4]]


def test_keys_have_groups_along_tokens_and_values_along_channels() -> None:
    settings = resolve_settings("asymkv", {}, 64)
    assert [build_codec("asymkv", side, 64, settings).settings()["axis"] for side in SIDES] == ["channel", "token"]
    assert [build_codec("asymkv", side, 64, settings).bits_per_element for side in SIDES] == [3.0, 2.0]


@pytest.mark.parametrize(
    "change", [{"low": 2}, {"low": 0}, {"high": 9}, {"key_layers": -1}, {"value_layers": -2}, {"group": 7}]
)
def test_bad_settings_are_refused(change: dict) -> None:
    with pytest.raises(InputError, match=r"expected .+; got .+; .+\."):
        build_codec("asymkv", "value", 64, resolve_settings("asymkv", change, 64))
