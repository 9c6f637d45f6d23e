"""What holds for every codec of every method: a new row in `METHODS` is tested here without a line more."""

from __future__ import annotations

import itertools

import pytest
import reference
import torch
from small import DIM, HEADS, fit, fitted, place, samples
from torch import Tensor

from kvfold import ops
from kvfold.codecs import KINDS, METHODS, Codec
from kvfold.codecs.base import Facts, Reader
from kvfold.codes import Codes
from kvfold.errors import InputError

CODECS = [(name, side) for name in METHODS for side in ("key", "value")]


@pytest.fixture(params=CODECS, ids="-".join)
def codec(request: pytest.FixtureRequest) -> Codec:
    return fitted(*request.param)


def vectors(batch: int = 2, tokens: int = 24) -> Tensor:
    return torch.stack([samples(tokens, seed) for seed in range(1, batch + 1)])


def assert_same(got: Codes, expected: Codes) -> None:
    assert got.fields.keys() == expected.fields.keys()
    for name, tensor in expected.fields.items():
        assert torch.equal(got.fields[name], tensor), name


def assert_decoded_same(got: Tensor, expected: Tensor) -> None:
    """Up to rounding: codes are equal bit for bit, but a matrix product may round otherwise in another shape."""
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_decoded_vectors_are_finite_float32_of_the_same_shape(codec: Codec) -> None:
    decoded = codec.decode(codec.encode(vectors()))
    assert decoded.dtype == torch.float32
    assert decoded.shape == (2, HEADS, 24, DIM)
    assert bool(decoded.isfinite().all())


def test_decoded_vectors_are_near_what_was_encoded(codec: Codec) -> None:
    x = samples()
    error = (codec.decode(codec.encode(x[None]))[0] - x).square().mean() / x.square().mean()
    assert float(error) < 0.5
    assert codec.distortion(x) == pytest.approx(float(error), rel=1e-5)


def test_every_field_has_batch_head_and_token_axes(codec: Codec) -> None:
    codes = codec.encode(vectors())
    assert codes.tokens == 24
    assert all(tensor.shape[:3] == (2, HEADS, 24) for tensor in codes.fields.values())


def test_bits_per_element_are_the_bits_in_memory(codec: Codec) -> None:
    x = vectors()
    assert codec.bits_per_element == 8 * codec.encode(x).nbytes / x.numel()


def test_a_restored_codec_is_the_same_codec(codec: Codec) -> None:
    again = KINDS[codec.kind].restore(DIM, codec.settings(), codec.tensors())
    codes = codec.encode(vectors())
    assert_same(again.encode(vectors()), codes)
    assert torch.equal(again.decode(codes), codec.decode(codes))
    assert (again.pre_rope, again.bits_per_element, again.codebook_bytes) == (
        codec.pre_rope,
        codec.bits_per_element,
        codec.codebook_bytes,
    )
    assert_same(codec.to(torch.device("cpu")).encode(vectors()), codes)


@pytest.mark.filterwarnings("ignore:std")  # of no tokens
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (5, 17), (22, 24), (7, 7)])
def test_blocks_of_tokens_are_coded_independently(codec: Codec, start: int, stop: int) -> None:
    x = vectors()
    start, stop = (-(-slot // codec.block) * codec.block for slot in (start, stop))
    codes = codec.encode(x)
    assert_same(codec.encode(x[:, :, start:stop]), codes.slice(start, stop))
    assert_decoded_same(codec.decode(codes.slice(start, stop)), codec.decode(codes)[:, :, start:stop])


def test_tokens_that_fill_no_block_are_refused(codec: Codec) -> None:
    if codec.block > 1:
        with pytest.raises(InputError, match=f"a multiple of {codec.block} tokens; got 23"):
            codec.encode(vectors(tokens=23))


def test_decoded_vectors_are_latents_in_a_basis(codec: Codec) -> None:
    if codec.basis is not None:
        codes = codec.encode(vectors())
        product = codec.latent(codes) @ codec.basis
        assert torch.allclose(codec.decode(codes), product, rtol=1e-5, atol=1e-5)  # which `decode` may sum in float64


def test_batch_rows_are_coded_independently(codec: Codec) -> None:
    x = vectors(3)
    codes = codec.encode(x)
    for row in range(3):
        alone = codes.map(lambda t, row=row: t[row : row + 1])
        assert_same(codec.encode(x[row : row + 1]), alone)
        assert_decoded_same(codec.decode(alone), codec.decode(codes)[row : row + 1])


def test_the_memory_layout_of_the_input_does_not_matter(codec: Codec) -> None:
    x = vectors()
    assert_same(codec.encode(x.transpose(1, 2).contiguous().transpose(1, 2)), codec.encode(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_coded_as_its_float32_value(codec: Codec, dtype: torch.dtype) -> None:
    x = vectors().to(dtype)
    assert_same(codec.encode(x), codec.encode(x.float()))


def test_encoding_leaves_its_input_alone(codec: Codec) -> None:
    x = vectors()
    codec.decode(codec.encode(x))
    assert torch.equal(x, vectors())


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_are_refused(codec: Codec, poison: float) -> None:
    x = vectors()
    x[1, 1, 23, 3] = poison
    with pytest.raises(InputError, match="finite"):
        codec.encode(x)


@pytest.mark.parametrize("dim", [DIM // 2, DIM + 8])
def test_another_head_dim_is_refused(codec: Codec, dim: int) -> None:
    with pytest.raises(InputError, match=f"head dim {DIM}; got {dim}"):
        codec.encode(torch.randn(1, HEADS, 3, dim))


@pytest.mark.parametrize(("name", "side"), CODECS)
def test_the_same_seed_fits_the_same_bytes(name: str, side: str) -> None:
    first, second = fit(name, side, seed=3).tensors(), fit(name, side, seed=3).tensors()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("name", "side"), CODECS)
def test_fit_tells_its_progress_step_by_step_and_keeps_its_samples(name: str, side: str) -> None:
    calls: list[int] = []
    codec = fitted(name, side)
    x = samples()
    again = KINDS[codec.kind].restore(DIM, codec.settings(), codec.tensors())
    again.fit(x, torch.Generator().manual_seed(0), lambda: calls.append(1), Facts(place=place))
    assert len(calls) == again.fit_steps
    assert torch.equal(x, samples())


def test_learned_tensors_can_be_saved(codec: Codec) -> None:
    tensors = codec.tensors()
    assert all(tensor.is_contiguous() and bool(tensor.float().isfinite().all()) for tensor in tensors.values())
    assert codec.codebook_bytes <= sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(("key_name", "value_name"), itertools.product(METHODS, METHODS))
def test_attention_on_codes_is_attention_on_decoded_vectors(key_name: str, value_name: str) -> None:
    keys, values = fitted(key_name, "key"), fitted(value_name, "value")
    key_codes, value_codes = keys.encode(vectors(tokens=1104)), values.encode(vectors(tokens=1104).flip(2))
    query, mask = torch.randn(2, 3 * HEADS, 4, DIM), torch.rand(2, 1, 4, 1104) < 0.5
    rotation, k = None, keys.decode(key_codes)
    if keys.reads_positions:
        positions = (torch.arange(1104) - torch.tensor([[0], [9]])).clamp_min(0)
        rotation = ops.Rotation(positions, torch.tensor([1.0, 0.1, 0.01]), 1.1, False)
        k = keys.place(k, rotation)
    got = Reader((keys, key_codes), (values, value_codes), rotation).attend(query, mask, 0.25, 30.0)
    expected = reference.attention(query, k, values.decode(value_codes), mask, 0.25, 30.0)
    for part, right in zip(got, expected, strict=True):
        assert torch.allclose(part.double(), right, rtol=1e-5, atol=1e-5)
