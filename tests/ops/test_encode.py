"""Laws of the residual search, for every backend: equal codes, ties to the lowest index.

Small integers make every distance exact in float32, whatever the order of summation; there ties are many and real.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import residual_codes
from small import fit, samples
from torch import Tensor

from kvfold import ops
from kvfold.ops.encode import naive


def integers(*shape: int, top: int = 3) -> Tensor:
    return torch.randint(-top, top + 1, shape).float()


def encode_one(rows: Tensor, tables: Tensor, beam: int, backend: str) -> Tensor:
    """Codes `[N, S]` of one head and one group."""
    stages = len(tables)
    return ops.encode(rows[None, None, :, None], tables, torch.arange(stages).view(stages, 1, 1), beam, backend)[0, 0, :, :, 0]


@pytest.mark.parametrize("dim", [1, 5, 8, 32])
@pytest.mark.parametrize("size", [2, 3, 16, 257])
@pytest.mark.parametrize("beam", [1, 2, 5])
def test_codes_are_those_of_the_definition_ties_included(backend: str, size: int, dim: int, beam: int) -> None:
    rows, tables = integers(23, dim), integers(3, size, dim, top=2)
    assert torch.equal(encode_one(rows, tables, beam, backend), residual_codes(rows, tables, beam))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("beam", [1, 4])
def test_codes_are_those_of_the_definition_on_real_numbers(backend: str, beam: int, dtype: torch.dtype) -> None:
    rows, tables = torch.randn(70, 8), (torch.randn(4, 33, 8) * torch.tensor([1, 0.5, 0.25, 0.1])[:, None, None]).to(dtype)
    assert torch.equal(encode_one(rows, tables, beam, backend), residual_codes(rows, tables, beam))


@pytest.mark.parametrize("beam", [1, 2])
@pytest.mark.parametrize("tokens", [1, 2, 65])
def test_of_equal_codewords_the_first_is_taken(backend: str, beam: int, tokens: int) -> None:
    tables = integers(2, 20, 5).repeat(1, 3, 1)
    assert int(encode_one(integers(tokens, 5), tables, beam, backend).max()) < 20


@pytest.mark.parametrize("beam", [3, 4, 7, 8, 16])
def test_candidates_may_be_many(backend: str, beam: int) -> None:
    """Every codeword comes 64 times, so that far more are as good as the best than a beam holds."""
    rows, tables = integers(9, 6), integers(3, 4, 6).repeat(1, 64, 1)
    rows[0], tables[1] = 0, 1
    assert torch.equal(encode_one(rows, tables, beam, backend), residual_codes(rows, tables, beam))


@pytest.mark.parametrize("beam", [1, 4, 8, 13])
@pytest.mark.parametrize(("length", "dim"), [(1e-3, 32), (1.0, 32), (1e3, 32), (1.0, 48), (1.0, 70)])
def test_codes_are_those_of_the_naive_op_whatever_the_lengths(backend: str, length: float, dim: int, beam: int) -> None:
    rows, tables = torch.randn(150, dim) * length, torch.randn(4, 256, dim) * torch.tensor([1, 0.5, 0.3, 0.1])[:, None, None]
    tables[:, ::7] *= 5
    assert torch.equal(encode_one(rows, tables, beam, backend), encode_one(rows, tables, beam, "naive"))


def test_the_largest_codebook_is_searched_to_its_end(backend: str) -> None:
    table = torch.stack((torch.arange(65536) // 256, torch.arange(65536) % 256), 1).float()
    index = torch.tensor([0, 1, 255, 256, 32767, 32768, 65534, 65535])
    assert encode_one(table[index], table[None], 1, backend).flatten().tolist() == index.tolist()
    assert encode_one(table[index], table[None], 2, backend).flatten().tolist() == index.tolist()


@pytest.mark.parametrize("beam", [1, 3])
def test_every_stage_head_and_group_uses_its_own_book(backend: str, beam: int) -> None:
    batch, heads, tokens, groups, stages = 2, 3, 5, 4, 3
    vectors, codebooks = integers(batch, heads, tokens, groups, 4), integers(7, 9, 4)
    book = torch.randint(7, (stages, heads, groups))
    codes = ops.encode(vectors, codebooks, book, beam, backend)
    assert codes.shape == (batch, heads, tokens, stages, groups)
    assert codes.dtype == torch.int32
    for head in range(heads):
        for group in range(groups):
            rows = vectors[:, head, :, group].reshape(-1, 4)
            expected = residual_codes(rows, codebooks[book[:, head, group]], beam)
            assert torch.equal(codes[:, head, :, :, group].reshape(-1, stages), expected), (head, group)


@pytest.mark.parametrize("beam", [1, 3])
def test_codes_do_not_depend_on_how_rows_are_blocked(backend: str, beam: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, tables = integers(300, 8), integers(3, 40, 8)
    whole = encode_one(rows, tables, beam, backend)
    assert torch.equal(torch.cat([encode_one(part, tables, beam, backend) for part in rows.split(7)]), whole)
    monkeypatch.setattr(naive, "_BLOCK_SCORES", 1)
    assert torch.equal(encode_one(rows, tables, beam, backend), whole)


@given(size=st.integers(2, 4), stages=st.integers(1, 3), dim=st.integers(1, 4), seed=st.integers(0, 999))
def test_a_beam_that_holds_everything_is_exhaustive_search(backend: str, size: int, stages: int, dim: int, seed: int) -> None:
    assume(backend != "gpu" or size**stages <= 16)  # no wider beam there
    torch.manual_seed(seed)
    rows, tables = integers(6, dim), integers(stages, size, dim)
    combinations = torch.cartesian_prod(*[torch.arange(size)] * stages).view(-1, stages)
    sums = sum(tables[s, combinations[:, s]] for s in range(stages))
    best = (rows[:, None] - sums).square().sum(-1).amin(1)
    codes = encode_one(rows, tables, size**stages, backend).long()
    reached = (rows - sum(tables[s, codes[:, s]] for s in range(stages))).square().sum(-1)
    assert torch.equal(reached, best)


def test_a_wider_beam_never_fits_the_training_set_worse(backend: str) -> None:
    with torch.device("cpu"):
        codec, x = fit("rvq", stages=4), samples()
    codec, x = codec.to(torch.get_default_device()), x.to(torch.get_default_device())
    vectors = (x / x.std(-1, keepdim=True))[None][..., codec.channels]

    def error(beam: int) -> float:
        codes = ops.encode(vectors, codec.codebooks, codec.book, beam, backend)
        return float((ops.decode(codes, codec.codebooks, codec.book, backend) - vectors).square().mean())

    errors = [error(beam) for beam in (1, 2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.95 * errors[0]


def test_errors_are_ordered_as_numbers_and_equal_ones_by_place() -> None:
    errors = torch.tensor([[2.0, -1e-7, 0.0, -3e-7, -0.0, 2.0, 1e-40, torch.inf]])
    assert naive._lowest(errors, 8).tolist() == [[3, 1, 2, 4, 6, 0, 5, 7]]


@pytest.mark.parametrize("beam", [1, 2])
@pytest.mark.parametrize("shape", [(1, 2, 0), (0, 2, 3)])
def test_no_tokens_no_codes(backend: str, beam: int, shape: tuple[int, int, int]) -> None:
    codes = ops.encode(torch.zeros(*shape, 2, 4), integers(3, 5, 4), torch.zeros(3, 2, 2, dtype=torch.int64), beam, backend)
    assert codes.shape == (*shape, 3, 2)
