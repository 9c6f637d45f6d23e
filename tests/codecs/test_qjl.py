"""Signs of random projections (`kvfold/codecs/qjl.py`)."""

from __future__ import annotations

import math

import pytest
import torch
from small import samples
from torch import Tensor

from kvfold.codecs import build_codec, resolve_settings
from kvfold.codecs.base import Reader
from kvfold.codecs.identity import IdentityCodec
from kvfold.codecs.kivi import KiviCodec
from kvfold.codecs.qjl import QjlCodec, projection_matrix
from kvfold.codes import unstripe
from kvfold.errors import InputError
from kvfold.packing import unpack


def estimates(seeds: int, query: Tensor, keys: Tensor, projection: str) -> Tensor:
    """`[seeds, keys]`: inner products of `query [D]` with coded `keys [N, D]`, a row a draw of the projection."""
    rows = []
    for seed in range(seeds):
        codec = QjlCodec(len(query), outliers=0, projection=projection, seed=seed)
        rows.append(codec.latent(codec.encode(keys[None, None]))[0, 0] @ (codec.basis @ query))
    return torch.stack(rows)


def a_query_and_keys(dim: int, keys: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Keys at all angles to a query, with peaks, of different norms; and the cosines."""
    torch.manual_seed(0)
    query, other = torch.randn(2, dim).unbind()
    lean = torch.linspace(-1, 1, keys)[:, None]
    keys_ = (lean * query + (1 - lean.abs()) * other * torch.logspace(-1, 1, dim)) * torch.linspace(0.1, 30, keys)[:, None]
    return query, keys_, keys_ @ query / (keys_.norm(dim=-1) * query.norm())


@pytest.mark.parametrize("projection", ["orthogonal", "gaussian"])
def test_inner_products_are_unbiased_over_draws_of_the_projection(projection: str) -> None:
    query, keys, _ = a_query_and_keys(16)
    drawn = estimates(600, query, keys, projection)
    error = drawn.std(0) / 600**0.5 + 2**-11 * (keys @ query).abs()  # and of the float16 norm
    assert bool(((drawn.mean(0) - keys @ query).abs() < 4 * error).all())
    if projection == "orthogonal":  # a key along the query shows that sqrt(pi / 2) would be 1.5 % off
        assert float(error[-1] / (keys @ query)[-1]) < 0.015 / 5


def test_the_variance_of_normal_rows_is_the_derived_one() -> None:
    """`sign(<s, k>) <s, q> ||k|| sqrt(pi / 2)` has mean `<q, k>` and mean square `pi / 2 ||q||^2 ||k||^2` for a row `s`."""
    query, keys, cosine = a_query_and_keys(32)
    unit = keys.norm(dim=-1) * query.norm()
    variance = (estimates(3000, query, keys, "gaussian") / unit).var(0) * 64
    expected = math.pi / 2 - cosine.square()
    torch.testing.assert_close(variance, expected, rtol=0.12, atol=0)  # the deviation of 3000 draws' variance is 2.6 %


def test_rotations_do_better_than_normal_rows() -> None:
    """The norm of `z = S k` does not vary, and of `sign(z)` only what is across `z` is noise: `pi / 2 - 1 - cos^2 / 2`."""
    query, keys, cosine = a_query_and_keys(64)
    unit = keys.norm(dim=-1) * query.norm()
    variance = (estimates(800, query, keys, "orthogonal") / unit).var(0) * 128
    expected = math.pi / 2 - 1 - cosine.square() / 2
    torch.testing.assert_close(variance, expected, rtol=0.25, atol=0)  # 5 % of 800 draws, 1 / D of theory
    assert bool((variance < math.pi / 2 - cosine.square()).all())


def test_scores_with_outliers_are_those_of_the_split_query() -> None:
    codec, keys, query = QjlCodec(16, outliers=3, outlier_sketch=1, group=8), samples(24)[None], torch.randn(16)
    codes = codec.encode(keys)
    channels = unstripe(codes.fields["channels"], 8, torch.uint8, (3,)).long()
    signs = unpack(codes.fields["codes"], 1, 48).float() * 2 - 1
    matrix, scale = projection_matrix(16, 2), codes.fields["scale"].float()
    gain = math.sqrt(16 / math.pi) * math.gamma(8) / math.gamma(8.5)  # E|z_1| for z uniform on the sphere of radius 4
    for head in range(2):
        for token in range(24):
            outlying = torch.zeros(16).index_fill(0, channels[0, head, token // 8], 1)
            inlier = signs[0, head, token, :32] @ (matrix @ (query * (1 - outlying))) * scale[0, head, token, 0] / (32 * gain)
            outlier = signs[0, head, token, 32:] @ (matrix[:16] @ (query * outlying)) * scale[0, head, token, 1] / (16 * gain)
            assert float(codec.decode(codes)[0, head, token] @ query) == pytest.approx(float(inlier + outlier), abs=1e-3)
    energy = keys.unflatten(2, (-1, 8)).square().sum(3)
    assert torch.equal(channels.sort(-1).values, energy.topk(3).indices.sort(-1).values)


@pytest.mark.parametrize("outliers", [0, 4])
def test_attention_decodes_no_key(outliers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, exact, x = QjlCodec(16, outliers=outliers, group=8), IdentityCodec(16), samples(16)[None]
    monkeypatch.setattr(QjlCodec, "decode", None)
    out, _ = Reader((codec, codec.encode(x)), (exact, exact.encode(x)), None).attend(torch.randn(1, 4, 2, 16), None, 0.25, None)
    assert bool(out.isfinite().all())


def test_a_loud_channel_costs_other_channels_nothing() -> None:
    loud, louder = samples(32)[None] * 0.1, samples(32)[None] * 0.1
    loud[..., 3] *= 100
    louder[..., 3] *= 1000
    codec = QjlCodec(16, outliers=1, group=8)
    kept = [c for c in range(16) if c != 3]
    plain, other = (codec.decode(codec.encode(x))[..., kept] for x in (loud, louder))
    torch.testing.assert_close(plain, other, rtol=0, atol=1e-3)
    without = QjlCodec(16, outliers=0)
    assert float((without.decode(without.encode(loud))[..., kept] - loud[..., kept]).square().mean()) > 10 * float(
        (plain - loud[..., kept]).square().mean()
    )


@pytest.mark.parametrize(
    ("dim", "layer", "changes", "bits"),
    [
        (128, 15, {}, (256 + 256 + 32 + 8) / 128),
        (64, 15, {}, 4.625),
        (64, 14, {}, 5.625),
        (64, 15, {"outliers": 0}, 2.25),
        (64, 0, {"outliers": 0, "first_layers": 0, "sketch": 1}, 1.25),
    ],
)
def test_bits_are_stored_and_first_layers_have_more(dim: int, layer: int, changes: dict[str, int], bits: float) -> None:
    codec = build_codec("qjl", "key", dim, resolve_settings("qjl", changes, dim), layer)
    x = torch.randn(1, 2, 64, dim)
    assert codec.bits_per_element == 8 * codec.encode(x).nbytes / x.numel() == bits


def test_values_are_coded_by_kivi() -> None:
    codec = build_codec("qjl", "value", 64, resolve_settings("qjl", {}, 64))
    assert isinstance(codec, KiviCodec)
    assert codec.settings() == {"axis": "token", "bits": 2, "group": 32}


@pytest.mark.parametrize("outliers", [0, 4])
def test_zeros_stay_zeros_and_huge_vectors_finite(outliers: int) -> None:
    codec = QjlCodec(16, outliers=outliers, group=4)
    assert not codec.decode(codec.encode(torch.zeros(1, 1, 4, 16))).any()
    for size in (1e30, 3e38):
        assert bool(codec.decode(codec.encode(torch.full((1, 1, 4, 16), size))).isfinite().all())


@pytest.mark.parametrize(
    "changes",
    [
        {"sketch": 0},
        {"outliers": 64},
        {"outliers": -1},
        {"group": 1},
        {"outlier_sketch": 3},
        {"outlier_sketch": 0},
        {"projection": "hadamard"},
    ],
)
def test_bad_settings_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"expected .+; got .+; .+\."):
        QjlCodec(64, **changes)  # type: ignore[arg-type]


def test_outliers_need_channels_that_fit_a_byte() -> None:
    with pytest.raises(InputError, match="head dim of at most 256"):
        QjlCodec(512)
    assert QjlCodec(512, outliers=0).block == 1
