from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small import DIM, HEADS, fit, fitted, samples
from torch import Tensor

from kvfold.codecs.base import Facts
from kvfold.codecs.residual import ResidualCodec, ResidualSettings
from kvfold.errors import InputError
from kvfold.ops import Coded
from kvfold.packing import unpack


def with_books(dim: int, stages: int, size: int, group: int, heads: int = 1, grouping: str = "contiguous") -> ResidualCodec:
    """A codec with random codebooks in place of fitted ones."""
    settings = ResidualSettings(group=group, codebook_size=size, stages=stages, grouping=grouping)
    book = torch.arange(stages)[:, None, None].expand(-1, heads, dim // group).contiguous()
    tensors = {"codebooks": torch.randn(stages, size, group).half(), "book": book}
    return ResidualCodec.restore(dim, settings.__dict__, tensors)


def first_stages(codec: ResidualCodec, stages: int) -> ResidualCodec:
    tensors = {name: tensor[:stages] for name, tensor in codec.tensors().items()}
    return ResidualCodec.restore(codec.head_dim, {**codec.settings(), "stages": stages}, tensors)


@pytest.mark.parametrize(
    ("dim", "size", "stages", "bits"),
    [
        (128, 2048, 8, 2.875),
        (64, 2048, 8, 3.0),
        (64, 256, 8, 2.25),
        (128, 256, 8, 2.125),
        (64, 256, 11, 3.0),
        (96, 4096, 4, 1.6667),
    ],
)
def test_bits_are_those_of_the_paper_and_really_packed(dim: int, size: int, stages: int, bits: float) -> None:
    codec = with_books(dim, stages, size, 32, heads=2)
    x = torch.randn(2, 2, 5, dim)
    assert codec.bits_per_element == pytest.approx(bits, abs=1e-4)
    assert 8 * codec.encode(x).nbytes / x.numel() == pytest.approx(bits, abs=1e-4)


def test_eleven_bit_codes_of_a_head_of_128_channels_take_44_bytes() -> None:
    codes = with_books(128, 8, 2048, 32).encode(torch.randn(1, 1, 1, 128))
    assert codes.fields["codes"].shape == (1, 1, 1, 44)
    assert codes.fields["scale"].dtype == torch.float16


def test_keys_take_strided_channels_and_values_contiguous_ones() -> None:
    assert torch.equal(fitted("rvq-paper", "key").channels, torch.tensor([list(range(p, DIM, 2)) for p in range(2)]))
    assert torch.equal(fitted("rvq-paper", "value").channels, torch.tensor([list(range(8)), list(range(8, 16))]))
    swapped = fit("rvq-paper", "key", key_groups="contiguous")
    assert torch.equal(swapped.channels, fitted("rvq-paper", "value").channels)


@pytest.mark.parametrize("grouping", ["strided", "contiguous"])
def test_a_vector_is_its_scale_times_its_codewords_on_its_channels(grouping: str) -> None:
    codec = with_books(12, 2, 5, 4, heads=2, grouping=grouping)
    codes = codec.encode(torch.randn(1, 2, 3, 12))
    indices, decoded = codec.indices(codes).long(), codec.decode(codes)
    for head, token, group in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(3)).tolist():
        first, second = indices[0, head, token, :, group]
        words = codec.codebooks[0, first].float() + codec.codebooks[1, second].float()
        channels = torch.arange(12).view(4, 3)[:, group] if grouping == "strided" else torch.arange(12).view(3, 4)[group]
        assert torch.equal(decoded[0, head, token, channels], words * codes.fields["scale"][0, head, token].float())


def test_codes_lie_stage_by_stage() -> None:
    codec = with_books(16, 3, 5, 4)
    codes = codec.encode(torch.randn(1, 1, 2, 16))
    flat = unpack(codes.fields["codes"], 3, 12)
    assert torch.equal(codec.indices(codes), flat.view(1, 1, 2, 3, 4))
    assert isinstance(codec.coded(codes), Coded)


def test_the_scale_is_the_standard_deviation_with_n_minus_1() -> None:
    x = samples()[None]
    scale = fitted("rvq-paper").encode(x).fields["scale"]
    mean = x.double().mean(-1, keepdim=True)
    right = ((x - mean).square().sum(-1, keepdim=True) / (DIM - 1)).sqrt()
    assert torch.allclose(scale.double(), right, rtol=2**-11 + 1e-6)
    assert not torch.allclose(scale.double(), right * (1 - 1 / DIM) ** 0.5, rtol=2**-9)


@pytest.mark.parametrize("factor", [0.25, 4.0, 64.0])
@pytest.mark.parametrize("beam", [1, 4])
def test_scaling_a_vector_changes_its_scale_and_no_code(factor: float, beam: int) -> None:
    codec, x = fitted("rvq-paper").with_beam(beam), samples()[None]
    plain, scaled = codec.encode(x), codec.encode(x * factor)
    assert torch.equal(scaled.fields["codes"], plain.fields["codes"])
    assert torch.equal(scaled.fields["scale"], plain.fields["scale"] * factor)


def test_zeros_decode_to_exactly_zero() -> None:
    x = samples(5)[None]
    x[0, 1, 2] = 0
    decoded = fitted("rvq-paper").decode(fitted("rvq-paper").encode(x))
    assert not decoded[0, 1, 2].any()
    assert decoded[0, 1, 1].any()
    assert not fitted("rvq-paper").decode(fitted("rvq-paper").encode(torch.zeros_like(x))).any()


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("value", [1e-8, -3e-5, 0.1, 7.3, -100.1, 1e6, 1e30])
def test_constant_vectors_survive(side: str, value: float) -> None:
    codec = fitted("rvq-paper", side)
    x = torch.full((1, HEADS, 1, DIM), value)
    for noise in (0, 1e-7, 1e-5):
        codes = codec.encode(x * (1 + noise * torch.randn_like(x)))
        assert bool(codes.fields["scale"].isfinite().all())
        decoded = codec.decode(codes)
        assert bool(decoded.isfinite().all())
        assert float(decoded.abs().max()) <= 10 * abs(value)


@pytest.mark.parametrize("value", [0.0, 0.1, 7.3, -100.1, 3000.0, 1e6])
def test_constant_vectors_among_the_samples_do_not_spoil_the_fit(value: float) -> None:
    x = samples()
    x[:, ::10] = value
    x[0, 5] = value + value * 1e-6 * torch.randn(DIM)
    codec = fit("rvq-paper", x=x)
    assert bool(codec.codebooks.isfinite().all())
    assert codec.distortion(samples()) < 2 * fitted("rvq-paper").distortion(samples())


@pytest.mark.parametrize("factor", [1e6, 1e30, 1e-8, 1e-30])
@pytest.mark.parametrize("beam", [1, 3])
def test_huge_and_tiny_vectors_stay_finite_and_keep_their_size_at_most(factor: float, beam: int) -> None:
    codec, x = fitted("rvq-paper").with_beam(beam), samples()[None] * factor
    decoded = codec.decode(codec.encode(x))
    assert bool(decoded.isfinite().all())
    assert float(decoded.abs().max()) <= 3 * float(x.abs().max())


@pytest.mark.parametrize("side", ["key", "value"])
def test_more_stages_never_fit_the_samples_worse(side: str) -> None:
    codec = fit("rvq-paper", side, stages=8)
    errors = [first_stages(codec, stages).distortion(samples()) for stages in range(1, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.6 * errors[0]


def test_greedy_codes_of_fewer_stages_are_the_first_codes_of_more() -> None:
    codec, x = fit("rvq-paper", stages=5), samples()[None]
    whole = codec.indices(codec.encode(x))
    for stages in range(1, 5):
        fewer = first_stages(codec, stages)
        assert torch.equal(fewer.indices(fewer.encode(x)), whole[..., :stages, :])


def test_one_quantizer_is_shared_by_heads_and_groups() -> None:
    codec = fitted("rvq-paper")
    assert codec.codebooks.shape == (3, 12, 8)
    assert torch.equal(codec.book, torch.arange(3)[:, None, None].expand(3, HEADS, 2))


def test_another_seed_fits_other_bytes() -> None:
    assert not torch.equal(fit("rvq-paper", seed=1).codebooks, fit("rvq-paper", seed=2).codebooks)


def test_k_means_sees_at_most_max_vectors() -> None:
    few = fit("rvq-paper", max_vectors=12, iterations=1)
    assert few.codebooks.shape == (3, 12, 8)
    x = samples()
    rows = (x / x.std(-1, keepdim=True).half().float())[..., few.channels].reshape(-1, 8)
    nearest = torch.cdist(few.codebooks[0].float(), rows).amin(1)
    assert float(nearest.max()) < 0.01  # as many codewords as vectors: each is one of them
    fit("rvq-paper", max_vectors=10**9)


@pytest.mark.parametrize(("size", "group", "dtype"), [(2, 8, torch.uint8), (4096, 1, torch.uint8)])
def test_small_and_large_codebooks_fit(size: int, group: int, dtype: torch.dtype) -> None:
    codec = fit("rvq-paper", x=samples(), codebook_size=size, group=group, stages=2, iterations=1)
    codes = codec.encode(samples()[None])
    assert codec.codebooks.shape == (2, size, group)
    assert codes.fields["codes"].dtype == dtype
    assert codec.distortion(samples()) < 1


def test_a_codebook_of_65536_takes_16_bits_a_code() -> None:
    codec = with_books(8, 1, 65536, 8)
    x = codec.codebooks[0, [0, 255, 256, 65535]].float()
    indices = codec.indices(codec.encode((x / x.std(-1, keepdim=True).half())[None, None]))
    assert codec.bits_per_element == 4.0
    assert indices.shape == (1, 1, 4, 1, 1)
    assert int(indices.max()) < 65536


def test_few_distinct_points_are_fitted_without_error() -> None:
    points = samples(6)
    codec = fit("rvq-paper", x=points.repeat(1, 50, 1), codebook_size=24, iterations=10)
    assert bool(codec.codebooks.isfinite().all())
    assert codec.distortion(points) < 1e-5


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(InputError, match=r"at least 64 sample vectors.*got 20"):
        fit("rvq-paper", x=samples(5), codebook_size=64)


def test_an_unfitted_codec_says_so() -> None:
    codec = ResidualCodec(DIM, ResidualSettings(group=8))
    with pytest.raises(InputError, match="fitted codec"):
        codec.encode(torch.randn(1, HEADS, 3, DIM))


@pytest.mark.parametrize("heads", [1, 3])
def test_other_kv_heads_are_refused(heads: int) -> None:
    codec = fitted("rvq-paper")
    with pytest.raises(InputError, match=f"{HEADS} KV heads; got {heads}"):
        codec.encode(torch.randn(1, heads, 3, DIM))


@pytest.mark.parametrize("dim", [40, 80, 7])
def test_a_group_that_does_not_divide_the_head_dim_is_refused_and_others_named(dim: int) -> None:
    with pytest.raises(InputError, match=f"divides the head dim {dim}; got group=32; set group to one of") as caught:
        ResidualCodec(dim, ResidualSettings())
    named = [int(word) for word in caught.value.fix.removeprefix("set group to one of ").split(", ")]
    assert all(dim % group == 0 for group in named)


@pytest.mark.parametrize(
    "change",
    [
        {"group": 0},
        {"stages": 0},
        {"beam": 0},
        {"iterations": -1},
        {"max_vectors": 0},
        {"codebook_size": 1},
        {"codebook_size": 65537},
        {"grouping": "diagonal"},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_by_name(change: dict) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        ResidualSettings(**change)


def _damaged(tensors: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    books, book = tensors["codebooks"], tensors["book"]
    return {
        "other group": {"codebooks": books[..., :4], "book": book},
        "other size": {"codebooks": books[:, :5], "book": book},
        "fewer stages": {"codebooks": books, "book": book[:2]},
        "other groups": {"codebooks": books, "book": book[..., :1]},
        "index too high": {"codebooks": books, "book": book + 1},
        "index below 0": {"codebooks": books, "book": book - 1},
        "flat book": {"codebooks": books, "book": book.flatten()},
        "flat codebooks": {"codebooks": books.flatten(), "book": book},
    }[how]


@pytest.mark.parametrize(
    "how",
    [
        "other group",
        "other size",
        "fewer stages",
        "other groups",
        "index too high",
        "index below 0",
        "flat book",
        "flat codebooks",
    ],
)
def test_tensors_that_do_not_fit_the_settings_are_refused(how: str) -> None:
    codec = fitted("rvq-paper")
    with pytest.raises(InputError, match="damaged"):
        ResidualCodec.restore(DIM, codec.settings(), _damaged(codec.tensors(), how))


def test_with_beam_keeps_the_codebooks_and_leaves_the_codec_alone() -> None:
    codec = fitted("rvq-paper")
    wide = codec.with_beam(6)
    assert wide.settings() == {**codec.settings(), "beam": 6}
    assert torch.equal(wide.codebooks, codec.codebooks)
    assert codec.settings()["beam"] == 1
    assert wide.distortion(samples()) < codec.distortion(samples())
    assert replace(ResidualSettings(**codec.settings()), beam=6) == ResidualSettings(**wide.settings())


def test_heads_may_have_codebooks_of_their_own() -> None:
    codec = fit("rvq-paper", sharing="head", max_vectors=10**9)
    assert codec.codebooks.shape == (3 * HEADS, 12, 8)
    assert torch.equal(codec.book[..., 0], torch.arange(3 * HEADS).view(3, HEADS))
    for head in range(HEADS):  # the first stage, whose samples do not depend on the other head, is what it is alone
        alone = fit("rvq-paper", x=samples()[head : head + 1].expand(1, -1, -1), max_vectors=10**9, iterations=40)
        both = fit("rvq-paper", sharing="head", max_vectors=10**9, iterations=40)
        x = samples()[None]
        errors = [(c.decode(c.encode(y)) - y).square().mean() for c, y in ((alone, x[:, head : head + 1]), (both, x))]
        assert float(errors[1]) < 1.5 * float(errors[0])
    shared, own = (fit("rvq-paper", sharing=how, max_vectors=10**9).distortion(samples()) for how in ("layer", "head"))
    assert own < shared


def test_codewords_in_8_bits_are_half_as_large_and_nearly_as_good() -> None:
    half, eighth = fit("rvq-paper"), fit("rvq-paper", codebook_dtype="float8")
    assert eighth.codebook_bytes * 2 == half.codebook_bytes
    assert eighth.distortion(samples()) < 1.05 * half.distortion(samples())
    again = ResidualCodec.restore(DIM, eighth.settings(), eighth.tensors())
    x = samples(seed=3)[None]
    assert torch.equal(again.encode(x).fields["codes"], eighth.encode(x).fields["codes"])
    assert torch.isfinite(eighth.with_codebooks(eighth.codebooks.float() * 1e9).codebooks.float()).all()


def test_a_scale_of_8_bits_costs_a_byte_less_and_no_accuracy() -> None:
    long, short = fit("rvq-paper"), fit("rvq-paper", scale_bits=8)
    codes = short.encode(samples()[None])
    assert codes.fields["scale"].dtype == torch.uint8
    assert short.bits_per_element == long.bits_per_element - 8 / DIM
    assert 8 * codes.nbytes == short.bits_per_element * samples().numel()
    assert short.distortion(samples()) < 1.1 * long.distortion(samples())


def sensitivity(strength: float = 30.0) -> Tensor:
    """`[G, D, D]`: the loss feels the first channels most, and some of them together."""
    basis = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(5)))[0]
    return ((basis * torch.logspace(0, -strength / 10, DIM)) @ basis.T).expand(HEADS, -1, -1)


def felt(codec: ResidualCodec, within: bool = True) -> float:
    """Mean of `e' M e`, `M` within groups only."""
    matrix = torch.zeros(HEADS, DIM, DIM)
    for channels in codec.channels:
        rows = channels[:, None]
        matrix[:, rows, channels] = sensitivity()[:, rows, channels]
    error = codec.decode(codec.encode(samples()[None])) - samples()[None]
    return float(torch.einsum("bgti,gij,bgtj->bgt", error, matrix, error).mean())


@pytest.mark.parametrize("grouping", ["strided", "contiguous"])
@pytest.mark.parametrize("sharing", ["layer", "head"])
def test_a_weighted_search_lowers_the_error_that_is_felt(grouping: str, sharing: str) -> None:
    def made(power: float) -> ResidualCodec:
        settings = ResidualSettings(
            group=8, codebook_size=12, stages=4, beam=4, grouping=grouping, sharing=sharing, weight_power=power
        )
        codec = ResidualCodec(DIM, settings)
        codec.fit(samples(), torch.Generator().manual_seed(0), facts=Facts(sensitivity=sensitivity()))
        return codec

    plain, weighted = made(0.0), made(1.0)
    assert plain.weights is None
    assert weighted.weights is not None
    assert weighted.weights.shape == (HEADS, 2, 8, 8)
    assert felt(weighted) < 0.7 * felt(plain)
    again = ResidualCodec.restore(DIM, weighted.settings(), weighted.tensors())
    x = samples(seed=4)[None]
    assert torch.equal(again.encode(x).fields["codes"], weighted.encode(x).fields["codes"])
    with pytest.raises(InputError, match="weights"):
        ResidualCodec.restore(DIM, weighted.settings(), {**weighted.tensors(), "weights": weighted.weights[:, :1]})


def test_weights_of_one_size_change_nothing() -> None:
    even = torch.eye(DIM).expand(HEADS, -1, -1) * 7.0
    codec = ResidualCodec(DIM, ResidualSettings(group=8, codebook_size=12, stages=3, weight_power=0.5))
    plain = ResidualCodec(DIM, ResidualSettings(group=8, codebook_size=12, stages=3))
    codec.fit(samples(), torch.Generator().manual_seed(0), facts=Facts(sensitivity=even))
    plain.fit(samples(), torch.Generator().manual_seed(0))
    assert abs(codec.distortion(samples()) / plain.distortion(samples()) - 1) < 0.1


def test_codebooks_that_are_trained_take_gradients_and_are_searched_as_they_are() -> None:
    codec = ResidualCodec(DIM, ResidualSettings(group=8, codebook_size=12, stages=3, weight_power=0.5))
    codec.fit(samples(), torch.Generator().manual_seed(0), facts=Facts(sensitivity=sensitivity()))
    live, x = codec.trainable(), samples(40)[None]
    with torch.no_grad():
        codes = live.encode(x)
    assert torch.equal(codes.fields["codes"], codec.encode(x).fields["codes"])
    live.decode(codes).square().sum().backward()
    assert live.codebooks.grad is not None
    chosen = codec.indices(codes).transpose(-1, -2).unique()
    assert float(live.codebooks.grad.abs().sum()) > 0
    assert len(chosen) > 1
    with torch.no_grad():
        live.codebooks.mul_(0.5)  # in place, as an optimizer does
        assert not torch.equal(live.encode(x).fields["codes"], codes.fields["codes"])
