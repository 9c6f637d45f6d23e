from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kvfold.codecs.kmeans import kmeans, nearest
from kvfold.errors import InputError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def error(rows: Tensor, codebook: Tensor) -> float:
    return float((rows - codebook[nearest(rows, codebook)]).double().square().sum())


def points(name: str) -> Tensor:
    """Row sets; in "repeated" and "lumps" random starts leave clusters empty."""
    return {
        "normal": torch.randn(500, 4),
        "repeated": torch.randn(20, 4).repeat(25, 1),
        "lumps": torch.randn(10, 1, 4).mul(10).add(0.5 * torch.randn(10, 50, 4)).flatten(0, 1),
        "zeros": torch.zeros(500, 4),
    }[name]


SETS = pytest.mark.parametrize("name", ["normal", "repeated", "lumps", "zeros"])


@SETS
@pytest.mark.parametrize("seed", range(3))
def test_error_never_grows_from_iteration_to_iteration(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, errors = points(name), []

    def recording(rows: Tensor, codebook: Tensor) -> Tensor:
        errors.append(error(rows, codebook))
        return nearest(rows, codebook)

    monkeypatch.setattr("kvfold.codecs.kmeans.nearest", recording)
    errors.append(error(rows, kmeans(rows, 30, seeded(seed), 8)))
    assert len(errors) == 9
    for before, after in itertools.pairwise(errors):
        assert after <= before * (1 + 1e-6) + 1e-9
    assert errors[-1] < 0.99 * errors[0] or errors[-1] == pytest.approx(0, abs=1e-6)


def test_the_start_is_distinct_rows() -> None:
    rows = torch.arange(50.0).view(50, 1)
    start = kmeans(rows, 20, seeded(), iterations=0)
    assert len(start.unique()) == 20
    assert bool(torch.isin(start, rows).all())


def test_the_last_step_is_an_update_of_the_means() -> None:
    rows = points("normal")
    before, after = kmeans(rows, 8, seeded(), 4), kmeans(rows, 8, seeded(), 5)
    index = nearest(rows, before)
    for word in range(8):
        assert torch.allclose(after[word], rows[index == word].mean(0), atol=1e-6)


@SETS
@pytest.mark.parametrize("iterations", [1, 10])
def test_a_codebook_never_adds_to_the_energy_of_its_residuals(name: str, iterations: int) -> None:
    rows = points(name)
    assert error(rows, kmeans(rows, 30, seeded(), iterations)) <= float(rows.double().square().sum()) + 1e-9


@pytest.mark.parametrize("seed", range(10))
def test_empty_clusters_move_to_rows_worst_served(seed: int) -> None:
    rows = torch.randn(6, 4).repeat(40, 1)
    assert error(rows, kmeans(rows, 6, seeded(seed), 10)) == pytest.approx(0, abs=1e-6)


def test_an_empty_cluster_that_does_not_move_stays() -> None:
    points = torch.randn(6, 4)
    codebook = kmeans(points.repeat(40, 1), 30, seeded(), 1)
    assert float(torch.cdist(codebook, points).amin(1).max()) < 1e-3


def test_as_many_codewords_as_rows_are_the_rows() -> None:
    rows = torch.randn(30, 4)
    codebook = kmeans(rows, 30, seeded(), 3)
    assert torch.equal(codebook[nearest(rows, codebook)], rows)


def test_the_order_of_the_channels_does_not_matter() -> None:
    rows, order = points("normal"), torch.tensor([2, 0, 3, 1])
    assert torch.allclose(kmeans(rows[:, order], 8, seeded(), 5), kmeans(rows, 8, seeded(), 5)[:, order], atol=1e-6)


def test_the_seed_decides() -> None:
    rows = points("normal")
    assert torch.equal(kmeans(rows, 8, seeded(1)), kmeans(rows, 8, seeded(1)))
    assert not torch.equal(kmeans(rows, 8, seeded(1)), kmeans(rows, 8, seeded(2)))


def test_assign_takes_the_nearest_and_of_equals_the_first() -> None:
    codebook = torch.tensor([[0.0], [4.0], [4.0], [8.0]])
    assert nearest(torch.tensor([[1.0], [2.0], [4.0], [5.0], [6.0], [99.0]]), codebook).tolist() == [0, 0, 1, 1, 1, 3]


def test_rows_are_left_alone() -> None:
    rows = points("repeated")
    before = rows.clone()
    kmeans(rows, 30, seeded())
    assert torch.equal(rows, before)


def test_fewer_rows_than_codewords_are_refused() -> None:
    with pytest.raises(InputError, match="at least 8 sample vectors for 8 codewords; got 7"):
        kmeans(torch.randn(7, 4), 8, seeded())
