"""What is particular to WKVQuant."""

from __future__ import annotations

import pytest
import torch
from small import DIM, HEADS, samples

from kvfold.codecs import build_codec, resolve_settings
from kvfold.codecs.kivi import KiviCodec
from kvfold.codecs.wkvquant import WkvQuantCodec
from kvfold.errors import InputError


def fitted(bits: int = 4, group: int = 8) -> WkvQuantCodec:
    codec = WkvQuantCodec(DIM, bits, group)
    codec.fit(samples(), torch.Generator())
    return codec


def plain(bits: int = 4, group: int = 8) -> WkvQuantCodec:
    return WkvQuantCodec(DIM, bits, group).with_channels(torch.zeros(HEADS, DIM), torch.ones(HEADS, DIM))


def test_shift_and_scale_make_every_channel_range_from_minus_1_to_1() -> None:
    codec = fitted()
    flat = (samples() - codec.shift[:, None]) / codec.scale[:, None]
    assert torch.allclose(flat.amax(1), torch.ones(HEADS, DIM), atol=1e-5)
    assert torch.allclose(flat.amin(1), -torch.ones(HEADS, DIM), atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_without_shift_and_scale_it_is_integers_of_a_token(bits: int) -> None:
    x = samples(40)[None]
    ours, kivi = plain(bits), KiviCodec(DIM, "token", bits, 8)
    codes, expected = ours.encode(x), kivi.encode(x)
    assert all(torch.equal(codes.fields[name], expected.fields[name]) for name in expected.fields)
    assert torch.equal(ours.decode(codes), kivi.decode(expected))
    assert ours.bits_per_element == kivi.bits_per_element == bits + 4


def test_channels_of_different_size_and_middle_cost_nothing() -> None:
    """Scaled and shifted channels are coded alike, where plain integers lose the quiet ones."""
    x = samples()
    size, middle = torch.logspace(-0.9, 0.9, DIM), torch.linspace(-3, 3, DIM)
    moved = x * size + middle * size
    codec, other = fitted(), WkvQuantCodec(DIM, 4, 8)
    other.fit(moved, torch.Generator())
    error = lambda c, y: (c.decode(c.encode(y[None]))[0] - y) / y.std(1, keepdim=True)  # noqa: E731
    assert float(error(other, moved).square().mean()) == pytest.approx(float(error(codec, x).square().mean()), rel=0.01)
    assert float(error(plain(), moved).square().mean()) > 5 * float(error(other, moved).square().mean())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_reading_with_gradients_is_decoding_what_was_encoded(bits: int) -> None:
    codec, x = fitted(bits), samples(50, seed=3)[None]
    assert torch.allclose(codec.through(x), codec.decode(codec.encode(x)), rtol=1e-5, atol=1e-6)  # but for float32


def test_gradients_reach_vectors_shifts_and_scales() -> None:
    codec, x = fitted(2), samples(50, seed=3)[None].requires_grad_()
    shift, scale = codec.shift.clone().requires_grad_(), codec.scale.clone().requires_grad_()
    error = (codec.with_channels(shift, scale).through(x) - x.detach()).square().sum()
    for gradient in torch.autograd.grad(error, (x, shift, scale)):
        assert bool(gradient.isfinite().all())
        assert float(gradient.abs().max()) > 0


def test_channels_that_are_constant_are_finite() -> None:
    x = samples()
    x[..., 3] = 7.0
    x[1] = 0.0
    codec = WkvQuantCodec(DIM, 4, 8)
    codec.fit(x, torch.Generator())
    decoded = codec.decode(codec.encode(x[None]))[0]
    assert bool((codec.scale > 0).all())
    assert float((decoded[0, :, 3] - 7).abs().max()) < 0.01
    assert not decoded[1].any()


def test_a_group_is_no_wider_than_a_head() -> None:
    settings = resolve_settings("wkvquant", {}, 64)
    codecs = [build_codec("wkvquant", side, 64, settings) for side in ("key", "value")]
    assert [codec.bits_per_element for codec in codecs] == [4.5, 4.5]
    assert [codec.pre_rope for codec in codecs] == [True, False]
    assert build_codec("wkvquant", "key", 128, settings).bits_per_element == 4.25


@pytest.mark.parametrize("changes", [{"bits": 0}, {"bits": 9}, {"group": 7}, {"group": 1}, {"train_steps": -1}])
def test_bad_settings_are_refused(changes: dict) -> None:
    with pytest.raises(InputError, match=r"expected .+; got .+; .+\."):
        build_codec("wkvquant", "key", 64, resolve_settings("wkvquant", changes, 64))


def test_a_damaged_scale_is_refused() -> None:
    with pytest.raises(InputError, match="scales above 0"):
        WkvQuantCodec.restore(DIM, {"bits": 4, "group": 8}, {"shift": torch.zeros(2, DIM), "scale": torch.zeros(2, DIM)})
