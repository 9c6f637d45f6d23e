"""Laws of codebooks learned by moving average."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvfold.codecs.ema import EmaBooks, _add_products
from kvfold.errors import InputError

S, C, DIM = 3, 8, 4


def rows(count: int = 400, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, DIM, generator=draw) * torch.linspace(0.5, 2, DIM)


def books(decay: float = 0.99, eps: float = 1e-5, stages: int = S, seed: int = 1) -> EmaBooks:
    tables = torch.randn(stages, C, DIM, generator=torch.Generator().manual_seed(seed))
    return EmaBooks(tables / torch.arange(1, stages + 1)[:, None, None], decay, eps)


def searched(tables: Tensor, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Greedy codes by plain distances, and what each stage sees, in float64."""
    residual, codes, seen = x.double(), [], []
    for table in tables.double():
        seen.append(residual)
        codes.append(torch.cdist(residual, table).argmin(1))
        residual = residual - table[codes[-1]]
    return torch.stack(codes, 1), [*seen, residual]


def test_the_start_is_the_papers() -> None:
    tables = torch.randn(S, C, DIM)
    made = EmaBooks(tables.half())
    assert made.tables.dtype == made.sums.dtype == made.counts.dtype == torch.float32
    torch.testing.assert_close(made.counts, torch.ones(S, C), rtol=0, atol=0)
    torch.testing.assert_close(made.sums, tables.half().float(), rtol=0, atol=0)
    assert (made.decay, made.eps) == (0.99, 1e-5)


def test_statistics_are_counts_and_sums_of_what_each_stage_sees() -> None:
    made, x = books(), rows()
    codes, counts, sums, error = made.statistics(x)
    expected, seen = searched(made.tables, x)
    assert torch.equal(codes.long(), expected)
    for stage in range(S):
        for code in range(C):
            chosen = expected[:, stage] == code
            assert counts[stage, code] == chosen.sum()
            torch.testing.assert_close(sums[stage, code].double(), seen[stage][chosen].sum(0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(error.double(), seen[-1].square().sum(), rtol=1e-5, atol=0)


def test_statistics_change_nothing() -> None:
    made = books()
    before = {name: tensor.clone() for name, tensor in made.state().items()}
    made.statistics(rows())
    for name, tensor in made.state().items():
        assert torch.equal(tensor, before[name])


def test_masked_rows_are_coded_but_do_not_count() -> None:
    made, x = books(), rows()
    mask = torch.rand(len(x)) < 0.6
    codes, *counted = made.statistics(x, mask)
    _, *alone = made.statistics(x[mask])
    for a, b in zip(counted, alone, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(codes, made.statistics(x)[0])
    _, *poisoned = made.statistics(torch.where(mask[:, None], x, 1e6), mask)
    for a, b in zip(poisoned, alone, strict=True):
        assert torch.equal(a, b)


@given(cut=st.integers(0, 400))
def test_statistics_of_parts_add_up(cut: int) -> None:
    made, x = books(), rows()
    whole = made.statistics(x)[1:]
    parts = [made.statistics(part)[1:] for part in (x[:cut], x[cut:])]
    for total, a, b in zip(whole, *parts, strict=True):
        torch.testing.assert_close(a + b, total, rtol=1e-5, atol=1e-4)  # float32 sums in another order


def test_without_decay_an_update_is_a_step_of_lloyd() -> None:
    made, x = books(decay=0.0), rows()
    codes, seen = searched(made.tables, x)
    _, counts, sums, _ = made.statistics(x)
    made.update(counts, sums)
    used = 0
    for stage in range(S):
        for code in range(C):
            chosen = seen[stage][codes[:, stage] == code]
            if len(chosen):
                used += 1
                mean = chosen.mean(0)  # smoothing by 1e-5 moves it by a hundred-thousandth at most
                torch.testing.assert_close(made.tables[stage, code].double(), mean, rtol=2e-5, atol=1e-5)
    assert used > S * C / 2


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_an_update_is_the_formula(decay: float) -> None:
    made, x = books(decay, eps=1e-2), rows()
    _, counts, sums, _ = made.statistics(x)
    start = {name: tensor.double().clone() for name, tensor in made.state().items()}
    made.update(counts, sums)
    n = decay * start["counts"] + (1 - decay) * counts.double()
    e = decay * start["sums"] + (1 - decay) * sums.double()
    smooth = (n + 1e-2) / (n.sum(1, keepdim=True) + C * 1e-2) * n.sum(1, keepdim=True)
    torch.testing.assert_close(made.counts.double(), n, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made.tables.double(), e / smooth[..., None], rtol=1e-4, atol=1e-5)


def test_codewords_close_in_on_the_batch_mean_by_the_decay() -> None:
    made = EmaBooks(torch.zeros(1, C, DIM), decay=0.9, eps=1e-9)
    means = torch.randn(1, C, DIM)
    for step in range(1, 6):
        made.update(torch.ones(1, C), means)  # one row a codeword, as many as at the start
        torch.testing.assert_close(made.tables, means * (1 - 0.9**step), rtol=1e-4, atol=1e-6)


@given(decay=st.floats(0, 0.99), seed=st.integers(0, 1000))
def test_one_stage_never_serves_fixed_data_worse(decay: float, seed: int) -> None:
    made, x = books(decay, stages=1, seed=seed), rows(100, seed)
    errors = []
    for _ in range(12):
        _, counts, sums, error = made.statistics(x)
        errors.append(float(error))
        made.update(counts, sums)
    # a convex step towards the means; smoothing, and at decay 0 codewords that nobody chose, move by eps
    assert all(after <= before * 1.0001 for before, after in pairwise(errors)), errors


def test_all_stages_learn() -> None:
    made, x = books(0.5), rows()
    errors = []
    for _ in range(30):
        _, counts, sums, error = made.statistics(x)
        errors.append(float(error))
        made.update(counts, sums)
    assert errors[-1] < 0.7 * errors[0]


def test_codewords_are_clipped_and_stay_finite_when_dead() -> None:
    made = EmaBooks(torch.ones(1, C, DIM), decay=0.1)
    made.update(torch.ones(1, C), torch.full((1, C, DIM), 1e6))
    assert float(made.tables.max()) == 100.0
    made = EmaBooks(torch.ones(1, C, DIM), decay=0.0)
    counts, sums = torch.zeros(1, C), torch.zeros(1, C, DIM)
    counts[0, 0], sums[0, 0] = 4.0, 8.0
    made.update(counts, sums)
    assert torch.isfinite(made.tables).all()
    torch.testing.assert_close(made.tables[0, 0], torch.full((DIM,), 2.0), rtol=1e-4, atol=0)


def test_dead_codewords_move_to_rows_and_live_ones_stay() -> None:
    made, x = books(stages=1), rows()
    made.counts[0] = torch.tensor([5.0, 0.01, 5.0, 0.0, 5.0, 5.0, 5.0, 5.0])
    before = made.tables.clone()
    assert made.reseed(x, torch.Generator().manual_seed(3), threshold=0.5) == 2
    for code in range(C):
        if code in (1, 3):
            assert (x == made.tables[0, code]).all(1).any()
            assert made.counts[0, code] == 0.5
            torch.testing.assert_close(made.sums[0, code], made.tables[0, code] * 0.5)
        else:
            assert torch.equal(made.tables[0, code], before[0, code])
    again = books(stages=1)
    again.counts.copy_(torch.tensor([5.0, 0.01, 5.0, 0.0, 5.0, 5.0, 5.0, 5.0]))
    again.reseed(x, torch.Generator().manual_seed(3), threshold=0.5)
    assert torch.equal(again.tables, made.tables)
    assert made.reseed(x, torch.Generator(), threshold=0.5) == 0


def test_a_deep_dead_codeword_moves_to_a_residual() -> None:
    made, x = books(stages=2), rows()
    made.counts[1, 6] = 0.0
    residual = x - made.tables[0, made.statistics(x)[0][:, 0].long()]
    assert made.reseed(x, torch.Generator().manual_seed(0), threshold=0.5) == 1
    assert (residual == made.tables[1, 6]).all(1).any()


def test_restored_books_go_on_bit_for_bit() -> None:
    made, other = books(), books(seed=9)
    made.update(*made.statistics(rows())[1:3])
    other.restore({name: tensor.clone() for name, tensor in made.state().items()})
    for one in (made, other):
        one.update(*one.statistics(rows(seed=5))[1:3])
    for a, b in zip(made.state().values(), other.state().values(), strict=True):
        assert torch.equal(a, b)


def test_no_rows_are_no_statistics() -> None:
    codes, counts, sums, error = books().statistics(rows(0))
    assert codes.shape == (0, S)
    assert float(counts.sum()) == float(sums.abs().sum()) == float(error) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EmaBooks(torch.zeros(C, DIM)), r"codebooks \[S, C, d\]"),
        (lambda: EmaBooks(torch.zeros(S, C, DIM), decay=1.0), "decay"),
        (lambda: EmaBooks(torch.zeros(S, C, DIM), decay=-0.1), "decay"),
        (lambda: EmaBooks(torch.zeros(S, C, DIM), eps=0.0), "eps"),
        (lambda: books().restore({}), "tables"),
        (lambda: books().restore({**books().state(), "sums": torch.zeros(S, C, DIM + 1)}), "sums"),
    ],
)
def test_bad_input_is_told(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_products_with_one_hot_codes_add_rows_as_an_index_does() -> None:
    x = torch.randn(20_000, DIM)
    index = torch.randint(C, (len(x),))
    products, indexed = torch.zeros(C, DIM), torch.zeros(C, DIM)
    _add_products(products, index, x)
    indexed.index_add_(0, index, x)
    torch.testing.assert_close(products, indexed, rtol=1e-4, atol=1e-3)  # other order of 2,500 float32 terms
