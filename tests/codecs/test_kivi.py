"""What is particular to KIVI."""

from __future__ import annotations

import pytest
import reference
import torch
from small import DIM, samples

from kvfold.codecs import build_codec, resolve_settings
from kvfold.codecs.base import Reader
from kvfold.codecs.kivi import KiviCodec, dequantize, quantize
from kvfold.errors import InputError


@pytest.mark.parametrize(("bits", "group", "expected"), [(2, 32, 3.0), (4, 32, 5.0), (2, 64, 2.5), (1, 32, 2.0)])
def test_bits_are_those_of_the_paper(bits: int, group: int, expected: float) -> None:
    settings = resolve_settings("kivi", {"bits": bits, "group": group}, 64)
    assert [build_codec("kivi", side, 64, settings).bits_per_element for side in ("key", "value")] == [expected] * 2


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_no_element_is_further_off_than_half_a_step(bits: int) -> None:
    x = samples(64)
    codes, scale = quantize(x, bits)
    step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / ((1 << bits) - 1)
    rounding = x.abs().amax(-1, keepdim=True) * 2**-10 * (1 << bits)  # of float16 step and minimum
    assert bool(((dequantize(codes, scale) - x).abs() <= step / 2 + rounding).all())
    assert int(codes.min()) == 0
    assert int(codes.max()) == (1 << bits) - 1


def test_a_channel_of_its_own_size_costs_other_channels_nothing() -> None:
    """Why keys have their groups along tokens."""
    x = samples(64)
    loud = x.clone()
    loud[..., 3] *= 1000
    codec = KiviCodec(DIM, "channel", 2, 8)
    plain, other = (codec.decode(codec.encode(y[None])) for y in (x, loud))
    kept = [c for c in range(DIM) if c != 3]
    assert torch.equal(plain[..., kept], other[..., kept])


def test_constant_groups_are_exact_up_to_float16() -> None:
    x = torch.full((1, 2, 8, DIM), 0.3)
    for axis in ("channel", "token"):
        codec = KiviCodec(DIM, axis, 2, 8)
        assert torch.allclose(codec.decode(codec.encode(x)), x, rtol=1e-3)


@pytest.mark.parametrize(
    ("axis", "bits", "group"), [("channel", 0, 8), ("token", 9, 8), ("token", 2, 7), ("channel", 2, 1), ("row", 2, 8)]
)
def test_bad_settings_are_refused(axis: str, bits: int, group: int) -> None:
    with pytest.raises(InputError, match=r"expected .+; got .+; .+\."):
        KiviCodec(DIM, axis, bits, group)


def test_blocks_need_not_fit_the_tiles_of_attention() -> None:
    keys, values = KiviCodec(DIM, "channel", 4, 48), KiviCodec(DIM, "token", 4, 8)
    x, query = samples(48 * 23)[None], torch.randn(1, 2, 1, DIM)
    got = Reader((keys, keys.encode(x)), (values, values.encode(x)), None).attend(query, None, 0.25, None)
    want = reference.attention(query, keys.decode(keys.encode(x)), values.decode(values.encode(x)), None, 0.25)
    assert torch.allclose(got[0].double(), want[0], atol=1e-5)
