"""AQLM: additive codebooks learned jointly under the error that counts (Egiazarian et al., arXiv 2401.06118, section 3).

The paper codes weights; here a key or value takes the place of a row. It is divided by its standard deviation `s`, its
channels are cut into groups of `group`, and a group is a sum of one codeword from each of `stages` codebooks. Codes and
codebooks minimize

    L = sum over vectors and groups of  s^2 e' M e,      e = y - sum_m C_m[b_m],   y a group of x / s

with `M` what inputs do to errors in the paper, and here what the model does to them (`Facts.demand`): of a key, the second
moment of the queries that meet it; of a value, the Gram matrix of the output projection. Of `M`, the blocks within the groups
count.

1. Codebooks start as those of residual k-means.
2. Codes: beam search for the sum nearest under `M`, which is the nearest in squared distance after a product with `M^(1/2)`. A
   vector keeps its codes where the search finds none better.
3. Codebooks: least squares for all codewords at once, by conjugate gradients from where they stand.

2 and 3 alternate until `L` falls no more, or `rounds` are over. Neither raises `L`, but for rounding of codewords to float16.
Stored as residual VQ stores it: bits per element = (stages * log2(codebook_size)) / group + 16 / D.

The search when tokens are cached is that of step 2. Everything else is `codecs/residual.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.codecs.base import NO_FACTS, Facts
from kvfold.codecs.residual import ResidualCodec, ResidualSettings
from kvfold.errors import InputError
from kvfold.packing import unpack_scale

_SOLVER_STEPS = 40
_LEAST_GAIN = 1e-3  # of the loss, below which a further round is not worth it


@dataclass(frozen=True)
class AqlmSettings(ResidualSettings):
    """As `ResidualSettings`, and:

    Attributes:
        rounds: alternations of search and least squares at most; 0 leaves residual k-means.
    """

    rounds: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 0:
            raise InputError("rounds of at least 0", str(self.rounds), "raise it")


class AqlmCodec(ResidualCodec):
    """Additive VQ of one side; see `ResidualCodec`.

    Attributes:
        losses: `L` over samples, a share of `L` of zeros, after k-means and after every round; empty unless just fitted.
    """

    kind = "aqlm"
    settings_type = AqlmSettings

    def __init__(self, head_dim: int, settings: AqlmSettings) -> None:
        super().__init__(head_dim, settings)
        self._rounds = settings.rounds
        self.wants = frozenset({"demand"} if settings.weight_power > 0 else ())
        self.losses: list[float] = []

    @property
    def fit_steps(self) -> int:
        return super().fit_steps + self._rounds

    def fit(
        self, x: Tensor, generator: torch.Generator, progress: Callable[[], None] = lambda: None, facts: Facts = NO_FACTS
    ) -> None:
        super().fit(x, generator, progress, Facts(sensitivity=facts.demand))
        tokens = max(1, self._settings.max_vectors // (x.shape[0] * self.groups))
        chosen = torch.randperm(x.shape[1], generator=generator)[:tokens].sort().values
        vectors, scale = self.scaled_groups(x[:, chosen])  # [G, n, P, d]
        fitting = AdditiveFit(vectors, unpack_scale(scale)[..., 0], self._form(facts.demand, x.shape[0]), self.book)
        codes = self._search_codes(vectors[None])[0]
        whole = max(fitting.whole, 1e-300)
        self.losses = [float(fitting.loss(self.codebooks, codes)) / whole]
        left, gain = self._rounds, 1.0
        while left and gain > _LEAST_GAIN:
            before = self.codebooks
            self.codebooks = self._stored(fitting.solve(before, codes))
            codes = fitting.better(self.codebooks, codes, self._search_codes(vectors[None])[0])
            loss = float(fitting.loss(self.codebooks, codes)) / whole
            gain = 1 - loss / max(self.losses[-1], 1e-300)
            if gain < 0:  # by rounding
                self.codebooks = before
            else:
                self.losses.append(loss)
            left -= 1
            progress()
        for _ in range(left):
            progress()

    def _form(self, demand: Tensor | None, heads: int) -> Tensor:
        """`M` as the search weighs with it, `[G, P, d, d]` float32; groups as large beside each other as they are."""
        if self.weights is None or demand is None:
            return torch.eye(self._settings.group).expand(heads, self.groups, -1, -1)
        root = self.weights.float()
        size = demand.diagonal(dim1=1, dim2=2)[:, self.channels].mean(-1) ** self._settings.weight_power  # [G, P]
        return (root @ root.mT) * (size / size.mean().clamp_min(1e-30))[..., None, None]


class AdditiveFit:
    """`L` as a function of codebooks and codes, for samples that stay.

    Args:
        vectors: scaled, float32 `[G, n, P, d]`.
        scale: float32 `[G, n]`.
        form: `M`, float32 `[G, P, d, d]`.
        book: integers `[S, G, P]`, which codebook a stage uses.
    """

    def __init__(self, vectors: Tensor, scale: Tensor, form: Tensor, book: Tensor) -> None:
        self._vectors, self._form, self._book = vectors, form, book
        self._weight = (scale.square() / scale.square().mean().clamp_min(1e-30))[..., None]  # [G, n, 1]
        self.whole = float(self._felt(vectors).sum())

    def _weighed(self, x: Tensor) -> Tensor:
        return torch.einsum("gnpd,gpde->gnpe", x, self._form) * self._weight[..., None]

    def _felt(self, error: Tensor) -> Tensor:
        return (self._weighed(error) * error).sum(-1, dtype=torch.float64)  # [G, n, P]

    def _rows(self, codes: Tensor, size: int) -> Tensor:
        """Codes `[G, n, S, P]` as rows of all codebooks below one another."""
        return codes.long() + self._book.transpose(0, 1)[:, None] * size

    def _errors(self, codebooks: Tensor, codes: Tensor) -> Tensor:
        table = codebooks.float()
        return self._vectors - table.flatten(0, 1)[self._rows(codes, table.shape[1])].sum(2)

    def loss(self, codebooks: Tensor, codes: Tensor) -> Tensor:
        """`L` of `codebooks [M, C, d]` and `codes [G, n, S, P]`, a float64 scalar."""
        return self._felt(self._errors(codebooks, codes)).sum()

    def better(self, codebooks: Tensor, codes: Tensor, others: Tensor) -> Tensor:
        """Group by group the one of two codes that has the lower error."""
        mine, theirs = (self._felt(self._errors(codebooks, each)) for each in (codes, others))
        return torch.where((theirs < mine)[:, :, None], others, codes)

    def solve(self, codebooks: Tensor, codes: Tensor, steps: int = _SOLVER_STEPS) -> Tensor:
        """Codebooks `[M, C, d]` float32 that minimize `L` with these codes; codewords without vectors stay as they are.

        The normal equations by preconditioned conjugate gradients (Golub and Van Loan, algorithm 11.5.1): `L` falls in every
        step, so stopping early is safe. The sum of two codebooks leaves a constant free, along which nothing moves.
        """
        rows = self._rows(codes, codebooks.shape[1])
        flat = codebooks.double().flatten(0, 1)

        def gathered(x: Tensor) -> Tensor:  # sums over the vectors that use a codeword
            total = torch.zeros_like(flat)
            for stage in range(rows.shape[2]):
                total.index_add_(0, rows[:, :, stage].flatten(), x.flatten(0, 2).double())
            return total

        used = gathered(self._weight[..., None].expand_as(self._vectors))  # a codeword's share of the diagonal
        residual = gathered(self._weighed(self._errors(codebooks, codes)))
        ready = residual / used.clamp_min(1e-30)
        direction, power = ready, (residual * ready).sum()
        first = power
        for _ in range(steps):
            if power <= 1e-14 * first or not power > 0:
                break
            image = gathered(self._weighed(direction[rows].sum(2).float()))
            step = power / (direction * image).sum()
            flat, residual = flat + step * direction, residual - step * image
            ready = residual / used.clamp_min(1e-30)
            power, last = (residual * ready).sum(), power
            direction = ready + power / last * direction
        return flat.float().view(codebooks.shape)
