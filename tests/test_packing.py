from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfold.packing import pack, pack_scale, packed_bytes, unpack, unpack_scale

WIDTHS = range(1, 17)


@given(
    bits=st.sampled_from(WIDTHS),
    count=st.integers(1, 70),
    batch=st.sampled_from([(), (3,), (2, 0), (2, 1, 3)]),
    seed=st.integers(),
)
def test_unpack_inverts_pack(bits: int, count: int, batch: tuple[int, ...], seed: int) -> None:
    codes = torch.randint(2**bits, (*batch, count), generator=torch.Generator().manual_seed(seed % 2**32), dtype=torch.int32)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*batch, packed_bytes(count, bits))
    assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_extreme_codes_survive(bits: int, dtype: torch.dtype) -> None:
    top = 2**bits - 1
    codes = torch.tensor([[top] * 9, [0] * 9, [0, top] * 4 + [0], [top, 0] * 4 + [top]], dtype=dtype)
    assert torch.equal(unpack(pack(codes, bits), bits, 9), codes.int())


@pytest.mark.parametrize("bits", WIDTHS)
def test_bits_lie_least_significant_first_without_gaps(bits: int) -> None:
    codes = torch.randint(2**bits, (13,))
    number = sum(code << (i * bits) for i, code in enumerate(codes.tolist()))
    assert bytes(pack(codes, bits).tolist()) == number.to_bytes(packed_bytes(13, bits), "little")


@pytest.mark.parametrize(("count", "bits", "size"), [(32, 11, 44), (16, 8, 16), (1, 1, 1), (9, 1, 2), (3, 5, 2), (70, 16, 140)])
def test_rows_take_whole_bytes_and_no_more(count: int, bits: int, size: int) -> None:
    assert packed_bytes(count, bits) == size
    assert pack(torch.zeros(count, dtype=torch.int32), bits).nbytes == size


@pytest.mark.parametrize("bits", [0, 17, -1])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="1 to 16 bits"):
        pack(torch.zeros(4, dtype=torch.int32), bits)
    with pytest.raises(ValueError, match="1 to 16 bits"):
        unpack(torch.zeros(4, dtype=torch.uint8), bits, 4)


def test_codes_may_be_a_strided_view() -> None:
    codes = torch.randint(2048, (6, 4, 3), dtype=torch.int32).transpose(0, 2)
    assert torch.equal(unpack(pack(codes, 11), 11, 6), codes)
    assert torch.equal(unpack(pack(codes, 11)[:, 1:], 11, 6), codes[:, 1:])


def test_a_scale_in_a_byte_is_a_float16_cut_to_three_bits() -> None:
    every = torch.arange(248, dtype=torch.uint8)  # the last is 61440
    assert torch.equal(pack_scale(unpack_scale(every)), every)
    assert float(unpack_scale(every)[-1]) == 61440.0
    scale = torch.logspace(-4.2, 4.78, 5000)
    assert float((unpack_scale(pack_scale(scale)) / scale - 1).abs().max()) <= 1 / 16 + 1e-3
    assert unpack_scale(pack_scale(torch.tensor([0.0, 1e-9, 1e9]))).tolist() == [0.0, 0.0, 61440.0]
    assert torch.equal(unpack_scale(scale.half()), scale.half().float())
