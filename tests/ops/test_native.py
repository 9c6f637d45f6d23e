"""The compiled CPU ops, every instruction set that runs here: shapes of their fast ways, errors, bounds, threads, fakes."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import reference
import torch
from coded import EXACT_ERROR, both, coded, rotation
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kvfold import ops
from kvfold.errors import InputError
from kvfold.ops import native
from kvfold.packing import pack_scale

pytestmark = [pytest.mark.skipif(not native.available_isas(), reason=native.MISSING), pytest.mark.usefixtures("isa")]
RELATIVE_ERROR = 1e-3  # root mean square over root mean square, of every head
# The matrix unit leaves out products of 2^-16 of the lengths. Where scales vary, the worst of 420 outputs is off by up to 4e-5
# (twelve seeds), all of them by 8e-6.
HALVES_ERROR = 6e-5


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def step_error(rope: str) -> float:
    """Of a decode step: integers may be used before RoPE, and after it where tables of bytes are looked up in registers."""
    return RELATIVE_ERROR if rope == "pre" or native.isa() in ("amx", "avx512") else EXACT_ERROR


def relative_error(out: Tensor, right: Tensor) -> float:
    return float(((out - right).square().mean(-1) / right.square().mean(-1)).sqrt().max())


def test_the_forced_instruction_set_runs(isa: str) -> None:
    assert native.isa() == isa
    assert native.module().__name__ == f"kvfold.ops._cpu_{isa}"


def test_an_instruction_set_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_CPU_ISA", "mmx")
    with pytest.raises(InputError, match="portable"):
        ops.encode(torch.zeros(1, 1, 1, 1, 2), torch.zeros(1, 2, 2), torch.zeros(1, 1, 1, dtype=torch.int64), backend="cpu")


@pytest.mark.parametrize("tokens", [256, 257, 1000, 4099, 17000])
@pytest.mark.parametrize("rope", ["post", "pre"])
def test_a_decode_step_attends_as_the_naive_op(rope: str, tokens: int) -> None:
    query, key, value = torch.randn(1, 8, 1, 128), coded(1, 2, tokens, strided=True), coded(1, 2, tokens)
    (out, lse), (right, right_lse) = both(query, key, value, rotation(tokens, 128) if rope == "pre" else None, None, 128**-0.5)
    assert relative_error(out, right) <= step_error(rope)
    assert float((lse - right_lse).abs().max()) <= 1e-3


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (9, 3), (5, 1), (8, 1), (12, 1), (16, 1), (17, 1)])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("rope", ["post", "pre"])
def test_any_number_of_heads_may_share_a_kv_head(rope: str, queries: int, heads: int, kv_heads: int) -> None:
    query, key, value = (
        torch.randn(2, heads, queries, 64),
        coded(2, kv_heads, 300, 64, strided=True),
        coded(2, kv_heads, 300, 64),
    )
    mask = torch.rand(2, 1, queries, 300) < 0.5
    mask[0, :, 0] = False
    turned = rotation(300, 64) if rope == "pre" else None
    (out, lse), (right, right_lse) = both(query, key, value, turned, mask, 0.125)
    assert not out[0, :, 0].any()
    assert bool((lse[0, :, 0] == -torch.inf).all())
    seen = right_lse > -torch.inf
    assert relative_error(out[seen], right[seen]) <= step_error(rope)


@pytest.mark.parametrize("size", [2, 200, 256, 300, 2048])
@pytest.mark.parametrize("stages", [1, 5, 8])
@pytest.mark.parametrize("rope", ["post", "pre"])
def test_codes_of_any_width_and_depth(rope: str, stages: int, size: int) -> None:
    sizes = {"dim": 64, "size": size, "stages": stages}
    query, key, value = torch.randn(1, 6, 1, 64), coded(1, 2, 700, strided=True, **sizes), coded(1, 2, 700, **sizes)
    (out, _), (right, _) = both(query, key, value, rotation(700, 64) if rope == "pre" else None, None, 0.125)
    assert relative_error(out, right) <= step_error(rope)


@pytest.mark.parametrize("queries", [1, 70])
@pytest.mark.parametrize("rope", ["post", "pre"])
def test_scales_and_codewords_may_take_a_byte(rope: str, queries: int) -> None:
    def short(side: ops.Coded, wide: Tensor) -> ops.Coded:
        stored = pack_scale(wide).transpose(1, 2).contiguous().transpose(1, 2)  # scales of a token do not lie side by side
        return side._replace(scale=stored, codebooks=side.codebooks.to(torch.float8_e4m3fn))

    tokens, wide = 300, (torch.randn(1, 2, 300, 1) * 0.3).exp()
    wide[0, 0, 3] = 0
    key, value = (short(coded(1, 2, tokens, 64, strided=strided, own="heads"), wide) for strided in (True, False))
    turned = rotation(tokens, 64) if rope == "pre" else None
    (out, lse), (right, right_lse) = both(torch.randn(1, 6, queries, 64), key, value, turned, None, 0.125)
    exact = HALVES_ERROR if native.isa() == "amx" else EXACT_ERROR
    assert relative_error(out, right) <= (step_error(rope) if queries == 1 else exact)
    assert float((lse - right_lse).abs().max()) <= 1e-2
    with pytest.raises((ValueError, TypeError), match="scale"):
        ops.attend(torch.randn(1, 6, 1, 64), key._replace(scale=key.scale[:, :1]), value, turned, None, 0.125, backend="cpu")


@pytest.mark.parametrize("tokens", [255, 256, 257, 400])
@pytest.mark.parametrize("apart", [3, 4, 36])
@pytest.mark.parametrize("short", [False, True])
def test_scales_may_lie_apart(short: bool, apart: int, tokens: int) -> None:
    """As in pages: the same to the last bit, and nothing behind the last scale is read (`make sanitize`)."""
    key, value = coded(1, 2, tokens, 64, strided=True), coded(1, 2, tokens, 64)
    if short:
        key, value = (side._replace(scale=pack_scale(side.scale.float())) for side in (key, value))
    spread = []
    for side in (key, value):
        memory = torch.full((2 * tokens * apart - apart + 1,), 255, dtype=torch.uint8).repeat_interleave(
            side.scale.element_size()
        )
        scale = memory.view(side.scale.dtype).as_strided((1, 2, tokens, 1), (1, tokens * apart, apart, 1))
        spread.append(side._replace(scale=scale.copy_(side.scale)))
    query = torch.randn(1, 6, 1, 64)
    together = ops.attend(query, key, value, None, None, 0.125, backend="cpu")
    assert all(map(torch.equal, ops.attend(query, *spread, None, None, 0.125, backend="cpu"), together))


@pytest.mark.parametrize("own", ["heads", "groups"])
@pytest.mark.parametrize("rope", ["post", "pre"])
def test_heads_and_groups_may_have_books_of_their_own(rope: str, own: str) -> None:
    query, key, value = torch.randn(1, 6, 1, 64), coded(1, 2, 400, 64, strided=True, own=own), coded(1, 2, 400, 64, own=own)
    (out, _), (right, _) = both(query, key, value, rotation(400, 64) if rope == "pre" else None, None, 0.125)
    assert relative_error(out, right) <= step_error(rope)


def test_positions_of_left_padded_rows_and_of_none_in_particular() -> None:
    query, key, value = torch.randn(2, 4, 1, 64), coded(2, 2, 500, 64, strided=True), coded(2, 2, 500, 64)
    padded = (torch.arange(500) - torch.tensor([[0], [137]])).clamp_min(0).int()
    scattered = torch.randint(100_000, (2, 500), dtype=torch.int32)
    for positions in (padded, scattered):
        turned = rotation(500, 64)._replace(positions=positions)
        (out, _), (right, _) = both(query, key, value, turned, None, 0.125)
        assert relative_error(out, right) <= RELATIVE_ERROR


@pytest.mark.parametrize("tokens", [3, 256, 300, 1000, 9001])
@pytest.mark.parametrize(("heads", "kv_heads", "queries"), [(8, 2, 1), (9, 3, 1), (3, 3, 2), (17, 1, 1), (4, 2, 70)])
@pytest.mark.parametrize("dim", [64, 128])
def test_keys_around_a_center_attend_as_the_naive_op(dim: int, heads: int, kv_heads: int, queries: int, tokens: int) -> None:
    query, center = torch.randn(2, heads, queries, dim), 2 * torch.randn(kv_heads, dim)
    key = coded(2, kv_heads, tokens, dim, strided=True, own="heads")._replace(center=center)
    value = coded(2, kv_heads, tokens, dim)
    mask = torch.rand(2, 1, queries, tokens) < 0.7
    padded = (torch.arange(tokens) - torch.tensor([[0], [137]])).clamp_min(0).int()
    for positions in (padded, torch.randint(20_000, (1, tokens), dtype=torch.int32)):
        turned = rotation(tokens, dim)._replace(positions=positions)
        (out, lse), (right, right_lse) = both(query, key, value, turned, mask, dim**-0.5, softcap=30.0)
        seen = right_lse > -torch.inf
        assert relative_error(out[seen], right[seen]) <= RELATIVE_ERROR  # angles up to 20,000 in float32
        assert torch.allclose(lse[seen], right_lse[seen], atol=5e-3)


def test_a_center_of_another_shape_or_without_positions_is_refused() -> None:
    query, key, value = torch.randn(1, 4, 1, 64), coded(1, 2, 300, 64), coded(1, 2, 300, 64)
    with pytest.raises(ValueError, match="center"):
        ops.attend(query, key._replace(center=torch.randn(3, 64)), value, rotation(300, 64), None, 1.0, backend="cpu")
    with pytest.raises(ValueError, match="center"):
        ops.attend(query, key._replace(center=torch.randn(2, 64)), value, None, None, 1.0, backend="cpu")


def test_a_query_that_is_not_finite_harms_no_other() -> None:
    query, key, value = torch.randn(1, 8, 1, 128), coded(1, 2, 300, strided=True), coded(1, 2, 300)
    query[0, 1, 0, 5] = float("inf")
    (out, _), (right, _) = both(query, key, value, None, None, 128**-0.5)
    others = [0, 2, 3, 4, 5, 6, 7]
    assert relative_error(out[:, others], right[:, others]) <= step_error("post")


@pytest.mark.parametrize("softcap", [2.0, 50.0])
def test_a_decode_step_caps_scores(softcap: float) -> None:
    query, key, value = 3 * torch.randn(1, 4, 1, 64), coded(1, 1, 400, 64), coded(1, 1, 400, 64)
    (out, lse), (right, right_lse) = both(query, key, value, None, None, 0.125, softcap=softcap)
    assert relative_error(out, right) <= 1e-5
    assert torch.allclose(lse, right_lse, atol=1e-4)


def test_slices_of_a_growing_store_are_read_in_place() -> None:
    query, key, value = torch.randn(2, 4, 1, 64), coded(2, 2, 900, 64), coded(2, 2, 900, 64)
    part = [side._replace(packed=side.packed[:, :, 100:600], scale=side.scale[:, :, 100:600]) for side in (key, value)]
    assert not part[0].packed.is_contiguous()
    (out, _), (right, _) = both(query, *part, None, None, 0.125)
    assert relative_error(out, right) <= step_error("post")


def test_vectors_of_scale_zero_are_zero() -> None:
    query, key, value = torch.randn(1, 4, 1, 64), coded(1, 2, 300, 64), coded(1, 2, 300, 64)
    key.scale[:, :, ::3], value.scale[:, :, ::2] = 0, 0
    mask = torch.rand(1, 1, 1, 300) < 0.7
    (out, lse), (right, right_lse) = both(query, key, value, None, mask, 0.125)
    assert relative_error(out, right) <= step_error("post")
    assert torch.allclose(lse, right_lse, atol=1e-3)


@pytest.mark.parametrize("length", [0.0, 1e-3, 1.0, 4.0, 30.0, 1000.0])
@pytest.mark.parametrize("case", ["even", "a key stands out", "a stage stands out", "one scale is large"])
def test_scores_of_any_range_are_within_the_bound(case: str, length: float) -> None:
    """Tables are rounded as finely as their range lets them be; where that is too coarse, float32 takes over."""
    query, key, value = torch.randn(1, 8, 1, 128) * length, coded(1, 2, 3000, strided=True), coded(1, 2, 3000)
    if case == "a key stands out":
        key.codebooks[0, 7] = query[0, 0, 0, :32].half()
        key.packed[0, 0, 1234, :4] = 7
    if case == "a stage stands out":
        key.codebooks[3] *= 20
    if case == "one scale is large":
        key.scale[0, 1, 77] = 30.0
    (out, lse), (right, right_lse) = both(query, key, value, None, None, 128**-0.5)
    assert relative_error(out, right) <= step_error("post")
    assert torch.allclose(lse, right_lse, rtol=1e-5, atol=1e-3)


def test_scores_that_rise_along_the_keys_do_not_overflow() -> None:
    """The maximum that weights are relative to has to follow, by leaps and by creeping."""
    tokens = 9000
    query, key, value = torch.ones(1, 4, 1, 64), coded(1, 1, tokens, 64), coded(1, 1, tokens, 64)
    key.codebooks[:] = 0
    key.codebooks[0, :, :] = 1.0
    key.scale[0, 0, :, 0] = torch.linspace(0, 400, tokens).half()
    (out, lse), (right, right_lse) = both(query, key, value, None, None, 0.125)
    assert bool(torch.isfinite(out).all())
    assert relative_error(out, right) <= 1e-4
    assert torch.allclose(lse, right_lse, rtol=1e-5)


@pytest.mark.parametrize("beam", [1, 4, 8])
def test_vectors_that_are_not_finite_spoil_no_others(beam: int) -> None:
    key = coded(1, 2, 1, 64, strided=True)
    vectors = torch.randn(1, 2, 90, 2, 32)
    right = ops.encode(vectors, key.codebooks, key.book, beam, "cpu")
    vectors[0, 0, 3:7], vectors[0, 1, 89, 1, 5] = torch.nan, torch.inf
    codes = ops.encode(vectors, key.codebooks, key.book, beam, "cpu")
    assert 0 <= int(codes.min()) <= int(codes.max()) < 256
    finite = vectors.isfinite().all(-1)[:, :, :, None].expand_as(codes)
    assert torch.equal(codes[finite], right[finite])


def test_codebooks_are_made_ready_once_for_all_ops() -> None:
    key, value = coded(1, 2, 300, 64, strided=True), coded(1, 2, 300, 64)
    ops.encode(torch.randn(1, 2, 3, 2, 32), key.codebooks, key.book, 1, "cpu")
    ops.attend(torch.randn(1, 4, 1, 64), key, value, None, None, 1.0, backend="cpu")
    ready = native.books(key.codebooks, key.book, key.channels)
    assert native.books(key.codebooks, key.book) is ready
    assert len(native._ready[id(key.codebooks)][1]) == 1


def test_codebooks_that_are_gone_are_let_go_of() -> None:
    key = coded(1, 2, 300, 64)
    native.books(key.codebooks, key.book, key.channels)
    place = id(key.codebooks)
    assert place in native._ready
    del key
    gc.collect()
    assert place not in native._ready


# -- leaving values unread ---------------------------------------------------------------------------------------------


def peaked(
    tail: Tensor, first: Tensor, second: Tensor, height: float, tokens: int = 2000
) -> tuple[Tensor, ops.Coded, ops.Coded]:
    """Two keys score `height`, the others 0; the two values are `first` and `second`, the others `tail`."""
    channels, book = torch.arange(32)[None], torch.zeros(1, 1, 1, dtype=torch.int64)
    scale = torch.ones(1, 1, tokens, 1, dtype=torch.float16)
    key_codes = torch.zeros(1, 1, tokens, 1, dtype=torch.uint8)
    value_codes = torch.full((1, 1, tokens, 1), 3, dtype=torch.uint8)
    key_codes[0, 0, [700, 1500]] = 1
    value_codes[0, 0, 700], value_codes[0, 0, 1500] = 1, 2
    keys, values = torch.zeros(1, 256, 32), torch.zeros(1, 256, 32)
    keys[0, 1, 0] = 1
    values[0, 1], values[0, 2], values[0, 3] = first, second, tail
    query = torch.zeros(1, 1, 1, 32)
    query[..., 0] = height
    return query, ops.Coded(key_codes, scale, keys, book, channels, 8), ops.Coded(value_codes, scale, values, book, channels, 8)


@pytest.mark.parametrize("height", [10.0, 17.0, 18.0, 19.0, 20.0, 25.0, 60.0])
@pytest.mark.parametrize("case", ["aligned", "cancelling", "nearly cancelling", "long tail values"])
def test_skipping_keeps_its_bound_also_where_the_large_weights_cancel(case: str, height: float) -> None:
    one, tail = torch.randn(32), torch.randn(32)
    second = {"aligned": one, "cancelling": -one, "nearly cancelling": -one * 0.9999}.get(case, one)
    query, key, value = peaked(tail * (1e4 if case == "long tail values" else 1), one, second, height)
    out, lse = ops.attend(query, key, value, None, None, 1.0, backend="cpu")
    right, right_lse = reference.attention(query, reference.decoded(key), reference.decoded(value), None, 1.0)
    rounding = 2e-7 * float(one.norm())  # what is left of two float32 sums that cancel
    assert float((out - right).norm()) <= 1.1e-4 * float(right.norm()) + rounding
    assert torch.allclose(lse.double(), right_lse, atol=1e-5)


def test_the_bound_is_settable_and_zero_reads_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = peaked(torch.ones(32), torch.eye(32)[0], torch.eye(32)[0], 14.0)
    right = reference.attention(query, reference.decoded(key), reference.decoded(value), None, 1.0)[0]
    errors = []
    for skip in ("0", "0.5"):
        monkeypatch.setenv("KVFOLD_SKIP", skip)
        errors.append(float((ops.attend(query, key, value, None, None, 1.0, backend="cpu")[0] - right).norm()))
    assert errors[0] <= 5e-5 * float(right.norm())
    assert 1e-4 * float(right.norm()) < errors[1] <= 0.5 * float(right.norm())  # something was left out, within the bound


@pytest.mark.parametrize("given", ["some", "-1", "1", "nan"])
def test_a_bound_that_is_none_is_told(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_SKIP", given)
    with pytest.raises(InputError, match="KVFOLD_SKIP"):
        ops.attend(torch.randn(1, 4, 1, 64), coded(1, 2, 9, 64), coded(1, 2, 9, 64), None, None, 1.0, backend="cpu")


# -- threads, fakes, fall-back -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_changes_nothing() -> None:
    key, value = coded(1, 3, 20_000, 64, strided=True), coded(1, 3, 20_000, 64)
    query, prompt = torch.randn(1, 9, 1, 64), torch.randn(1, 9, 100, 64)
    vectors, recent = torch.randn(1, 3, 500, 2, 32), torch.randn(1, 3, 90, 64)
    results = []
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        step = ops.attend(query, key, value, rotation(20_000, 64), None, 0.125, backend="cpu")
        whole = ops.attend(prompt, key, value, None, None, 0.125, backend="cpu")
        together = ops.attend_both(query, ops.Past(key, value), None, ops.Exact(recent, recent, None), 0.125, backend="cpu")
        codes = ops.encode(vectors, key.codebooks, key.book, 3, "cpu")
        stored = ops.code(vectors.flatten(3), key.codebooks, key.book, key.channels, None, key.bits, 3, backend="cpu")
        results.append((*step, *whole, *together, codes, *stored))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_past_is_read_again_and_again() -> None:
    """By other queries and in other types; codebooks that were written to since are read anew."""
    key, value = coded(1, 2, 600, 64, strided=True), coded(1, 2, 600, 64)
    past = ops.Past(key, value, rotation(600, 64))
    for _ in range(2):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            query = torch.randn(1, 5, 4, 64).to(dtype).transpose(1, 2)
            got = ops.attend_both(query, past, None, None, 0.125, backend="cpu")
            right = ops.attend(query.float(), key, value, past.rotation, None, 0.125, backend="cpu")
            assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))
        for side in (key, value):
            side.codebooks.mul_(0.75)
            side.scale.mul_(2)  # what is stored is read where it lies


def test_fake_tensors_see_the_shapes() -> None:
    key, value = coded(2, 2, 300, 64), coded(2, 2, 300, 64)
    turned = rotation(300, 64)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor
        out, lse = ops.attend(fake(torch.randn(2, 4, 5, 64)), key, value, turned, None, 1.0, backend="cpu")
        assert (out.shape, lse.shape, out.dtype) == ((2, 4, 5, 64), (2, 4, 5), torch.float32)
        too = ops.Exact(fake(torch.randn(2, 2, 9, 64)), fake(torch.randn(2, 2, 9, 64)), None)
        out, lse = ops.attend_both(fake(torch.randn(2, 4, 5, 64)), ops.Past(key, value, turned), None, too, 1.0, backend="cpu")
        assert (out.shape, lse.shape) == ((2, 4, 5, 64), (2, 4, 5))
        vectors = fake(torch.randn(2, 2, 7, 2, 32))
        codes = ops.encode(vectors, key.codebooks, key.book, 1, "cpu")
        assert (codes.shape, codes.dtype) == ((2, 2, 7, 8, 2), torch.int32)
        assert ops.decode(codes, key.codebooks, key.book, "cpu").shape == vectors.shape
        books = fake(key.codebooks), fake(key.book), fake(key.channels)
        packed, scale = ops.code(fake(torch.randn(2, 2, 7, 64)), *books, None, key.bits, 1, 8, "cpu")
        assert (packed.shape[:3], scale.shape, scale.dtype) == ((2, 2, 7), (2, 2, 7, 1), torch.uint8)
        dense = fake(torch.randn(2, 2, 9, 64))
        assert ops.attend_exact(fake(torch.randn(2, 4, 5, 64)), dense, dense, None, 1.0, backend="cpu")[0].shape == (
            2,
            4,
            5,
            64,
        )


def test_codebooks_that_are_written_to_are_made_ready_again() -> None:
    codebooks, book = torch.randn(1, 4, 2), torch.zeros(1, 1, 1, dtype=torch.int64)
    codes = torch.full((1, 1, 1, 1, 1), 2, dtype=torch.int32)
    first = ops.decode(codes, codebooks, book, "cpu")
    codebooks[0, 2] += 1
    assert torch.equal(ops.decode(codes, codebooks, book, "cpu"), first + 1)
