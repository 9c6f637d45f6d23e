"""What Triton's encode and decode do beside the laws of all backends: tiles, packing, statistics, memory, what is refused.

Without a GPU they run in Triton's interpreter. Small integers make every distance exact, so that codes are equal, ties and all.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvfold.codecs.ema import EmaBooks
from kvfold.errors import InputError
from kvfold.ops.decode import naive as naive_decode
from kvfold.ops.encode import naive
from kvfold.packing import pack

pytest.importorskip("triton")

from kvfold.ops.decode import gpu as gpu_decode
from kvfold.ops.encode import gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPREADS: dict[str, Callable[[Tensor], Tensor]] = {
    "one batch twice": lambda v: v.expand(2, -1, -1, -1, -1),
    "channels apart": lambda v: v.mT.contiguous().mT,
    "every other channel": lambda v: v[..., 1::2],
}
NO_NUMBERS = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under the interpreter
BEAMS = pytest.mark.parametrize("beam", [1, 2, 4, 5, 16])


def integers(*shape: int, top: int = 3) -> Tensor:
    return torch.randint(-top, top + 1, shape, device=DEVICE).float()


def books(count: int, *shape: int) -> Tensor:
    return torch.randint(count, shape, device=DEVICE)


@BEAMS
@pytest.mark.parametrize(
    ("tokens", "dim", "size"), [(1, 1, 2), (1, 32, 300), (23, 5, 3), (23, 8, 16), (130, 32, 257), (130, 1, 300)]
)
def test_codes_are_those_of_plain_pytorch(tokens: int, dim: int, size: int, beam: int) -> None:
    vectors, codebooks, book = integers(1, 2, tokens, 1, dim), integers(4, size, dim, top=2), books(4, 3, 2, 1)
    codes = gpu.encode(vectors, codebooks, book, beam)
    assert codes.dtype == torch.int32
    assert torch.equal(codes, naive.encode(vectors, codebooks, book, beam))


@pytest.mark.parametrize(("beam", "tokens", "size"), [(1, 130, 300), (2, 40, 300), (5, 20, 270), (16, 6, 270)])
def test_neither_blocks_nor_chunks_of_a_real_gpu_change_codes(
    beam: int, tokens: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "interpreted", lambda: False)
    assert tokens > gpu._tiles(tokens, size, 8, beam)["ROWS"]
    assert size > gpu._tiles(tokens, size, 8, beam)["CHUNK"]
    vectors, codebooks, book = integers(1, 1, tokens, 1, 8), integers(2, size, 8, top=2), books(2, 2, 1, 1)
    assert torch.equal(gpu.encode(vectors, codebooks, book, beam), naive.encode(vectors, codebooks, book, beam))


@pytest.mark.parametrize("beam", [1, 4])
@pytest.mark.parametrize("of_vectors", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("of_books", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(of_vectors: torch.dtype, of_books: torch.dtype, beam: int) -> None:
    vectors, codebooks, book = (
        torch.randn(1, 1, 30, 2, 8),
        torch.randn(3, 40, 8),
        torch.arange(3)[:, None, None].expand(3, 1, 2),
    )
    vectors, codebooks, book = vectors.to(DEVICE, of_vectors), codebooks.to(DEVICE, of_books), book.to(DEVICE)
    assert torch.equal(gpu.encode(vectors, codebooks, book, beam), naive.encode(vectors, codebooks, book, beam))


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS)
def test_vectors_and_books_may_lie_anywhere(spread: Callable[[Tensor], Tensor], beam: int) -> None:
    vectors = spread(integers(1, 3, 2, 7, 8).permute(0, 2, 3, 1, 4))  # [B, T, ...] to [B, G, T, ...]
    codebooks, book = integers(9, 6, vectors.shape[-1], top=2).transpose(0, 1)[:5], books(5, 3, 3, 2).transpose(1, 2)
    vectors = vectors[:, :, :, :3]
    assert not vectors.is_contiguous()
    assert torch.equal(gpu.encode(vectors, codebooks, book, beam), naive.encode(vectors, codebooks, book, beam))


@pytest.mark.parametrize("beam", [1, 3])
def test_heads_and_groups_share_books_or_do_not(beam: int) -> None:
    vectors, codebooks = integers(2, 2, 5, 3, 4), integers(12, 9, 4, top=2)
    for book in (books(12, 2, 2, 3), books(12, 2, 1, 1).expand(2, 2, 3), books(12, 2, 2, 1).expand(2, 2, 3)):
        assert torch.equal(gpu.encode(vectors, codebooks, book, beam), naive.encode(vectors, codebooks, book, beam))


def test_real_numbers_have_the_codes_of_plain_pytorch_but_for_near_ties() -> None:
    vectors, codebooks = torch.randn(1, 2, 200, 2, 16, device=DEVICE), torch.randn(8, 64, 16, device=DEVICE)
    book = torch.arange(8, device=DEVICE).view(4, 1, 2).expand(4, 2, 2)
    for beam in (1, 4):
        check_close(vectors, codebooks * 0.5 ** (book[:, 0, 0].repeat_interleave(2)[:, None, None] / 2), book, beam)


def check_close(vectors: Tensor, codebooks: Tensor, book: Tensor, beam: int) -> None:
    """Few codes differ, and where they do the error is as good: to what float32 resolves of a squared length."""
    codes, expected = gpu.encode(vectors, codebooks, book, beam), naive.encode(vectors, codebooks, book, beam)
    assert (codes != expected).any(-2).float().mean() < 1e-3
    reached, best = (
        (vectors - naive_decode.decode(found, codebooks, book)).double().square().sum(-1).mean() for found in (codes, expected)
    )
    torch.testing.assert_close(reached, best, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("beam", [1, 2])
def test_packed_codes_are_packed_codes(bits: int, beam: int) -> None:
    vectors, codebooks, book = integers(1, 2, 9, 3, 4), integers(5, min(1 << bits, 40), 4, top=2), books(5, 3, 2, 3)
    packed = gpu.encode_packed(vectors, codebooks, book, beam, bits)
    expected = pack(naive.encode(vectors, codebooks, book, beam).flatten(-2), bits)
    assert (packed.shape, packed.dtype) == (expected.shape, torch.uint8)
    assert torch.equal(packed, expected)


@pytest.mark.parametrize("bits", [8, 16])
def test_the_last_codes_of_whole_bytes_fit_them(bits: int) -> None:
    table = torch.stack((torch.arange(1 << bits) // 256, torch.arange(1 << bits) % 256), 1).float()[None].to(DEVICE)
    index = torch.tensor([0, 1, 127, 128, 255, 32767, 32768, 65535], device=DEVICE)
    index = index[index < 1 << bits]
    packed = gpu.encode_packed(table[0, index][None, None, :, None], table, index.new_zeros(1, 1, 1), 1, bits)
    assert torch.equal(packed[0, 0], pack(index[:, None], bits))


def test_bits_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="1 to 16 bits"):
        gpu.encode_packed(integers(1, 1, 1, 1, 4), integers(1, 2, 4), books(1, 1, 1, 1), 1, 17)


@NO_NUMBERS
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tiled", [False, True])
def test_statistics_are_those_of_the_moving_average(masked: bool, tiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if tiled:
        monkeypatch.setattr(gpu, "interpreted", lambda: False)
    rows, tables = integers(130, 5), integers(3, 20, 5, top=2)
    mask = (torch.rand(130, 2, device=DEVICE) < 0.5)[:, 0] if masked else None
    expected = EmaBooks(tables).statistics(rows, mask)
    if mask is not None:
        rows = torch.where(mask[:, None], rows, torch.inf)
        expected = (EmaBooks(tables).statistics(rows)[0], *expected[1:])
    found = gpu.encode_statistics(rows, tables, mask)
    counted = slice(None) if mask is None else mask
    assert torch.equal(found[0][counted], expected[0][counted])
    for one, other in zip(found[1:], expected[1:], strict=True):  # integers add up the same in any order
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert torch.equal(one, other)


@NO_NUMBERS
@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_harms_no_other_vector_and_has_codes_in_range(bad: float, beam: int) -> None:
    vectors, codebooks, book = integers(1, 1, 20, 1, 4), integers(2, 9, 4, top=2), books(2, 2, 1, 1)
    expected = naive.encode(vectors, codebooks, book, beam)
    vectors[0, 0, 7] = bad
    codes = gpu.encode(vectors, codebooks, book, beam)
    assert 0 <= int(codes.min()) <= int(codes.max()) < 9
    others = torch.arange(20, device=DEVICE) != 7
    assert torch.equal(codes[:, :, others], expected[:, :, others])


def test_nothing_beside_the_result_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Tensor] = []

    def fenced(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        count = torch.Size(shape).numel()
        kept.append(torch.full((count + 128,), 77, dtype=dtype, device=device))
        return kept[-1][64 : 64 + count].view(shape)

    vectors, codebooks, book = integers(1, 2, 7, 3, 5), integers(4, 9, 5, top=2), books(4, 2, 2, 3)
    expected = [naive.encode(vectors, codebooks, book, beam) for beam in (1, 3)]
    monkeypatch.setattr(torch, "empty", fenced)
    codes = [gpu.encode(vectors, codebooks, book, beam) for beam in (1, 3)]
    decoded = gpu_decode.decode(codes[0], codebooks, book)
    monkeypatch.undo()
    assert torch.equal(torch.stack(codes), torch.stack(expected))
    assert torch.equal(decoded, naive_decode.decode(expected[0], codebooks, book))
    for memory in kept:
        assert bool((memory[:64] == 77).all())
        assert bool((memory[-64:] == 77).all())
    assert len(kept) == 3


def test_what_does_not_fit_is_refused() -> None:
    vectors, codebooks, book = integers(1, 1, 3, 1, 4), integers(1, 5, 4), books(1, 1, 1, 1)
    for beam in (0, 17):
        with pytest.raises(InputError, match=rf"expected a beam of 1 to 16 on a GPU; got {beam}; take a narrower"):
            gpu.encode(vectors, codebooks, book, beam)
    with pytest.raises(InputError, match="groups of at most 1024 channels on a GPU; got 1025; take smaller"):
        gpu.encode(integers(1, 1, 3, 1, 1025), integers(1, 5, 1025), book)


def test_shapes_that_do_not_fit_are_refused_before_memory_is_read() -> None:
    vectors, codebooks, book = integers(1, 2, 3, 2, 4), integers(3, 5, 4), books(3, 2, 2, 2)
    wrong = [(vectors, codebooks, book[:, :1]), (vectors, codebooks, book[..., :1]), (vectors, codebooks[..., :3], book)]
    for given in wrong:
        with pytest.raises(ValueError, match="shape of vectors"):
            gpu.encode(*given)
    with pytest.raises(ValueError, match="shape of rows"):
        gpu.encode_statistics(integers(5, 4), codebooks, torch.ones(4, dtype=torch.bool, device=DEVICE))
    with pytest.raises(ValueError, match="shape of codes"):
        gpu_decode.decode(gpu.encode(vectors, codebooks, book), codebooks, book[:1])


def test_no_tokens() -> None:
    nothing, codebooks, book = integers(1, 2, 0, 3, 4), integers(4, 9, 4), books(4, 2, 2, 3)
    assert gpu.encode(nothing, codebooks, book).shape == (1, 2, 0, 2, 3)
    assert gpu.encode_packed(nothing, codebooks, book, 2, 11).shape == (1, 2, 0, 9)
    assert gpu.encode_packed(nothing, codebooks, book, 2, 16).shape == (1, 2, 0, 12)
    codes, *rest = gpu.encode_statistics(integers(0, 4), codebooks)
    assert codes.shape == (0, 4)
    assert all(not bool(part.any()) for part in rest)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("of_books", [torch.float16, torch.bfloat16, torch.float32])
def test_vectors_are_those_of_plain_pytorch_to_the_last_bit(dtype: torch.dtype, of_books: torch.dtype) -> None:
    codes = books(100, 2, 9, 50, 3, 6).transpose(1, 3)[..., ::2]  # [B, G, T, S, P] in no order of its own
    codebooks, book = torch.randn(7, 100, 5, device=DEVICE).to(of_books), books(7, 9, 3, 3).mT
    assert torch.equal(gpu_decode.decode(codes.to(dtype), codebooks, book), naive_decode.decode(codes, codebooks, book))


def test_codes_that_name_no_codeword_read_none() -> None:
    codes = torch.tensor([-(2**31), -1, 0, 8, 9, 2**31 - 1], dtype=torch.int32, device=DEVICE).view(1, 1, 6, 1, 1)
    codebooks, book = torch.randn(1, 9, 4, device=DEVICE), books(1, 1, 1, 1)
    assert torch.equal(gpu_decode.decode(codes, codebooks, book), gpu_decode.decode(codes.clamp(0, 8), codebooks, book))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("beam", [1, 2, 5, 16])
def test_real_shapes(beam: int) -> None:
    shape, stages = (1, 8, 4096, 4, 32), 8
    book = torch.arange(stages * 4, device=DEVICE).view(stages, 1, 4).expand(stages, 8, 4)
    whole, tables = integers(*shape), integers(stages * 4, 256, 32, top=1)
    codes = gpu.encode(whole, tables, book, beam)
    assert torch.equal(codes, naive.encode(whole, tables, book, beam))
    assert torch.equal(gpu_decode.decode(codes, tables, book), naive_decode.decode(codes, tables, book))
    real = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    scale = 0.7 ** torch.arange(stages, device=DEVICE).repeat_interleave(4)
    check_close(real, torch.randn(stages * 4, 256, 32, device=DEVICE) * scale[:, None, None], book, beam)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("beam", [1, 4])
def test_calls_are_captured_in_a_graph(beam: int) -> None:
    vectors, codebooks, book = integers(1, 2, 64, 4, 32), integers(4, 256, 32), books(4, 4, 2, 4)
    for _ in range(2):  # compiled before it is captured
        gpu_decode.decode(gpu.encode(vectors, codebooks, book, beam), codebooks, book)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes = gpu.encode(vectors, codebooks, book, beam)
        decoded = gpu_decode.decode(codes, codebooks, book)
    vectors.copy_(integers(*vectors.shape))
    graph.replay()
    assert torch.equal(codes, naive.encode(vectors, codebooks, book, beam))
    assert torch.equal(decoded, naive_decode.decode(codes, codebooks, book))
