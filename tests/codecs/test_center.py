"""Keys after RoPE coded around their rotated mean (`ResidualSettings.center`)."""

from __future__ import annotations

import pytest
import reference
import torch
from small import DIM, HEADS, fit, place, samples

from kvfold import ops
from kvfold.codecs.base import Facts, Reader
from kvfold.codecs.residual import ResidualCodec, ResidualSettings
from kvfold.errors import InputError


def test_keys_after_rope_are_coded_around_their_rotated_mean() -> None:
    """Keys whose mean is most of them: the center is that mean, and what it explains costs no codes."""
    x = samples() + 5 * torch.randn(HEADS, 1, DIM, generator=torch.Generator().manual_seed(3))
    sizes = {"group": 8, "codebook_size": 12, "stages": 3}
    plain, centered = ResidualCodec(DIM, ResidualSettings(**sizes)), ResidualCodec(DIM, ResidualSettings(**sizes, center=True))
    plain.fit(place(x), torch.Generator().manual_seed(0))
    centered.fit(x, torch.Generator().manual_seed(0), facts=Facts(place=place))
    assert torch.allclose(centered.center, x.mean(1), atol=1e-5)
    assert (plain.reads_positions, centered.reads_positions) == (False, True)
    turned = ops.Rotation(torch.arange(x.shape[1])[None], torch.tensor([1.0, 0.1, 0.01]), 1.1, False)
    keys = place(x)[None]
    read = centered.place(centered.decode(centered.encode(centered.unplace(keys, turned))), turned)
    assert torch.allclose(centered.place(centered.unplace(keys, turned), turned), keys, atol=1e-5)
    assert float((read - keys).square().mean()) < 0.5 * plain.distortion(place(x)) * float(keys.square().mean())
    assert centered.codebook_bytes == plain.codebook_bytes + 4 * HEADS * DIM
    again = ResidualCodec.restore(DIM, centered.settings(), centered.tensors())
    assert torch.equal(
        again.place(again.decode(centered.encode(keys)), turned), centered.place(again.decode(centered.encode(keys)), turned)
    )
    without = {name: tensor for name, tensor in centered.tensors().items() if name != "center"}
    for tensors in (without, {**without, "center": centered.center[:, :1]}):
        with pytest.raises(InputError, match="center"):
            ResidualCodec.restore(DIM, centered.settings(), tensors)


def test_a_center_is_for_keys_after_rope_only() -> None:
    with pytest.raises(InputError, match="rope=post or center=0"):
        ResidualSettings(center=True, pre_rope=True)


def test_a_center_stands_still_in_a_model_without_rope() -> None:
    codec = fit("rvq", rope="post", x=samples() + 3)
    value = fit("rvq", "value")
    x, query = samples(40)[None] + 3, torch.randn(1, HEADS, 1, DIM)
    codes = codec.encode(codec.unplace(x, None))
    values = value.encode(samples(40)[None])
    got = Reader((codec, codes), (value, values), None).attend(query, None, 0.25, None)
    keys = codec.place(codec.decode(codes), None)
    assert float((keys - x).square().mean()) < 0.3 * float(x.square().mean())
    want = reference.attention(query, keys, value.decode(values), None, 0.25)
    assert torch.allclose(got[0].double(), want[0], atol=1e-5)
