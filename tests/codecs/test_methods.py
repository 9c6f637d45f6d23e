"""Methods by name and their settings (`kvfold/codecs/__init__.py`)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.codecs import KINDS, METHODS, build_codec, method, resolve_settings
from kvfold.errors import InputError


@pytest.mark.parametrize("name", METHODS)
def test_every_method_builds_codecs_that_can_be_restored(name: str) -> None:
    settings = resolve_settings(name, {}, 64)
    assert settings == METHODS[name].defaults
    for side in ("key", "value"):
        codec = build_codec(name, side, 64, settings)
        assert KINDS[codec.kind] is type(codec)
        assert type(codec).restore(64, codec.settings(), codec.tensors()).settings() == codec.settings()
        assert not (side == "value" and codec.pre_rope)


@pytest.mark.parametrize(
    ("name", "side", "dim", "bits"),
    [
        ("rvq-paper", "key", 128, 2.875),
        ("rvq-paper", "value", 64, 3.0),
        ("rvq", "key", 64, 2.125),
        ("rvq", "value", 64, 2.375),
        ("identity", "key", 64, 32.0),
    ],
)
def test_bits_of_the_presets(name: str, side: str, dim: int, bits: float) -> None:
    assert build_codec(name, side, dim, resolve_settings(name, {}, dim)).bits_per_element == bits


def test_sides_and_rope_follow_the_settings() -> None:
    settings = resolve_settings("rvq", {"rope": "post", "key_groups": "contiguous", "value_groups": "strided", "beam": "4"}, 64)
    key, value = (build_codec("rvq", side, 64, settings) for side in ("key", "value"))
    assert (key.pre_rope, key.settings()["grouping"], key.settings()["beam"]) == (False, "contiguous", 4)
    assert (value.pre_rope, value.settings()["grouping"]) == (False, "strided")
    assert build_codec("rvq", "key", 64, resolve_settings("rvq", {}, 64)).pre_rope


@given(
    name=st.sampled_from(["rvq", "rvq-post", "rvq-paper"]),
    bits=st.floats(0.3, 12),
    dim=st.sampled_from([16, 64, 80, 128]),
    group=st.sampled_from([1, 2, 8, 16]),
    size=st.sampled_from([2, 3, 256, 2048, 65536]),
)
def test_bits_choose_the_most_stages_that_fit(name: str, bits: float, dim: int, group: int, size: int) -> None:
    changes = {"group": group, "codebook_size": size}

    def cost(stages: int, extra: int) -> float:
        settings = resolve_settings(name, {**changes, "stages": stages, "extra_value_stages": extra}, dim)
        return sum(build_codec(name, side, dim, settings).bits_per_element for side in ("key", "value")) / 2

    odd = {"rvq": 1, "rvq-post": -1, "rvq-paper": 0}[name]
    if cost(1, 0) > bits:
        with pytest.raises(InputError, match="bits of at least"):
            resolve_settings(name, {**changes, "bits": bits}, dim)
    else:
        chosen = resolve_settings(name, {**changes, "bits": bits}, dim)
        stages, extra = chosen["stages"], chosen["extra_value_stages"]
        assert extra in (0, odd)
        assert cost(stages, extra) <= bits + 1e-9
        low = min(stages, stages + extra)
        assert cost(low, 1) > bits if odd and not extra else cost(low + 1, 0) > bits


@pytest.mark.parametrize(
    ("name", "bits", "dim", "stages", "extra"),
    [
        ("rvq", "1.25", 64, 4, 1),
        ("rvq", 1.75, 64, 6, 1),
        ("rvq", "2.25", 64, 8, 1),
        ("rvq", 3, 64, 11, 1),
        ("rvq", 4.0, 64, 15, 1),
        ("rvq", 2.125, 128, 8, 0),
        ("rvq-post", 2.25, 64, 9, -1),
        ("rvq-post", 3, 64, 12, -1),
        ("rvq-paper", 3.0, 64, 8, 0),
        ("rvq-paper", 2.875, 128, 8, 0),
    ],
)
def test_bits_of_the_table(name: str, bits: str | float, dim: int, stages: int, extra: int) -> None:
    settings = resolve_settings(name, {"bits": bits}, dim)
    assert (settings["stages"], settings["extra_value_stages"]) == (stages, extra)


BAD = {
    "an unknown method": ("svd", {}),
    "an unknown setting": ("rvq", {"colour": 3}),
    "bits of a method without stages": ("identity", {"bits": 2}),
    "stages of a method without": ("identity", {"stages": 2}),
    "text for a number": ("rvq", {"stages": "many"}),
    "a fraction for a whole number": ("rvq", {"stages": 2.5}),
    "nothing for a number": ("rvq", {"stages": None}),
    "a wrong choice": ("rvq", {"rope": "during"}),
    "another wrong choice": ("rvq", {"value_groups": "Strided"}),
    "too few bits": ("rvq", {"bits": 0.3}),
    "bits that are no number": ("rvq", {"bits": "nan"}),
    "bits without end": ("rvq", {"bits": "inf"}),
    "text for bits": ("rvq", {"bits": "few"}),
    "bits with no group": ("rvq", {"bits": 2, "group": 0}),
    "bits with a group too large": ("rvq", {"bits": 2, "group": 128}),
    "bits with a codebook of one": ("rvq", {"bits": 2, "codebook_size": 1}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_refused_in_three_parts(case: str) -> None:
    with pytest.raises(InputError, match=r"expected .+; got .+; .+\."):
        resolve_settings(*BAD[case], 64)


def test_no_stage_left_for_values_is_refused() -> None:
    with pytest.raises(InputError, match="stages"):
        build_codec("rvq-post", "value", 64, resolve_settings("rvq-post", {"stages": 1}, 64))


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(InputError, match="float32, float16, bfloat16; got 'int8'"):
        build_codec("identity", "key", 64, resolve_settings("identity", {"dtype": "int8"}, 64))


def test_other_names_are_told() -> None:
    with pytest.raises(InputError, match="rvq, rvq-post, rvq-paper, turboquant, kivi, "):
        method("svd")
