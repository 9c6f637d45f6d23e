"""Codebooks learned online by exponential moving average (A. Kumar, arXiv 2410.15704, section 3; `methods.md` 1.2).

Every codeword keeps two running means: how many rows chose it in a batch (`counts`) and the sum of those rows (`sums`).
After a batch with counts `n` and sums `e`,

    counts <- decay * counts + (1 - decay) * n        sums <- decay * sums + (1 - decay) * e
    smooth  = (counts + eps) / (sum(counts) + C * eps) * sum(counts)                (Laplace smoothing)
    codeword = sums / smooth, clipped to +-100

which is van den Oord et al., arXiv 1711.00937, appendix A.1, applied to every stage of a residual quantizer on what the
stages before it leave. The paper starts at k-means centroids with a count of 1 each, takes decay 0.99, eps 1e-5 and
float32 accumulators, and revives no dead codewords; `reseed` does, for those who want it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold import ops
from kvfold.errors import InputError

DECAY, EPS = 0.99, 1e-5
_LIMIT = 100.0  # of a codeword's values, as in the paper's code
_BLOCK = 1 << 13  # rows of one product of one-hot codes on an accelerator


class EmaBooks:
    """The codebooks of one residual quantizer while they are learned, one a stage.

    Args:
        tables: start, `[S, C, d]`; copied as float32.
        decay: share of the past kept by an update, 0 <= decay < 1.
        eps: of the Laplace smoothing, above 0.

    Attributes:
        tables: codebooks, float32 `[S, C, d]`.
        counts: running mean of the rows a batch gives each codeword, float32 `[S, C]`; 1 at the start.
        sums: running mean of the sum of those rows, float32 `[S, C, d]`; `tables` at the start.

    Raises:
        InputError: tables of another rank, or decay or eps out of range.
    """

    def __init__(self, tables: Tensor, decay: float = DECAY, eps: float = EPS) -> None:
        if tables.ndim != 3:
            raise InputError("codebooks [S, C, d]", f"a shape of {tuple(tables.shape)}", "give one codebook a stage")
        if not 0 <= decay < 1:
            raise InputError("a decay from 0 to below 1", f"{decay:g}", "the paper takes 0.99")
        if not eps > 0:
            raise InputError("an eps above 0", f"{eps:g}", "the paper takes 1e-5")
        self.decay, self.eps = decay, eps
        self.tables = tables.detach().to(torch.float32, copy=True).contiguous()
        self.counts = torch.ones(tables.shape[:2], device=tables.device)
        self.sums = self.tables.clone()

    @torch.no_grad()
    def statistics(self, rows: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Code `rows` greedily and gather what `update` needs; nothing is changed, and results of batches add up.

        Args:
            rows: scaled group vectors, float `[N, d]`.
            mask: bool `[N]`, False for rows that do not count (padding); None counts all.

        Returns:
            `(codes, counts, sums, squared_error)`: int32 `[N, S]`, of all rows; float32 `[S, C]` and `[S, C, d]`, of the
            rows that count; and their summed squared error after the last stage, a float32 scalar.
        """
        stages, size, _ = self.tables.shape
        rows = rows.float()
        codes = self._encode(rows)
        counted, residual = (codes, rows) if mask is None else (codes[mask], rows[mask])
        counts, sums = torch.zeros_like(self.counts), torch.zeros_like(self.sums)
        for stage in range(stages):
            index = counted[:, stage].long()
            counts[stage] = torch.bincount(index, minlength=size)
            _add_rows(sums[stage], index, residual)
            residual = residual - self.tables[stage, index]
        return codes, counts, sums, residual.square().sum()

    @torch.no_grad()
    def update(self, counts: Tensor, sums: Tensor) -> None:
        """One step towards the means of a batch: `counts [S, C]` and `sums [S, C, d]` as `statistics` returns them."""
        self.counts.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        self.sums.mul_(self.decay).add_(sums, alpha=1 - self.decay)
        total = self.counts.sum(1, keepdim=True)
        smooth = (self.counts + self.eps) / (total + self.counts.shape[1] * self.eps) * total
        self.tables.copy_((self.sums / smooth[..., None]).clamp_(-_LIMIT, _LIMIT))

    @torch.no_grad()
    def reseed(self, rows: Tensor, generator: torch.Generator, threshold: float = 1.0) -> int:
        """Move codewords whose running count is below `threshold` to random `rows [N, d]`; returns how many moved.

        Stage by stage, on what the stages before leave of the rows. A moved codeword starts with a count of `threshold`.
        The rows are drawn with a CPU `generator`.
        """
        residual, moved = rows.float(), 0
        for stage, table in enumerate(self.tables):
            dead = (self.counts[stage] < threshold).nonzero().flatten()[: len(residual)]
            if len(dead):
                chosen = torch.randperm(len(residual), generator=generator)[: len(dead)].to(residual.device)
                table[dead] = residual[chosen].clamp(-_LIMIT, _LIMIT)
                self.counts[stage, dead] = threshold
                self.sums[stage, dead] = table[dead] * threshold
                moved += len(dead)
            residual = residual - table[self._encode(residual, stage)[:, 0].long()]
        return moved

    def to(self, device: torch.device) -> None:
        """Move the codebooks and what is learned of them to `device`."""
        self.tables, self.counts, self.sums = (tensor.to(device) for tensor in self.state().values())

    def state(self) -> dict[str, Tensor]:
        """Everything learned so far, for a checkpoint; the tensors are the live ones, not copies."""
        return {"tables": self.tables, "counts": self.counts, "sums": self.sums}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from `state()` of books of the same shape.

        Raises:
            InputError: a tensor is missing or of another shape.
        """
        for name, mine in self.state().items():
            came = state.get(name)
            if came is None or came.shape != mine.shape:
                got = "nothing" if came is None else f"a shape of {tuple(came.shape)}"
                fix = "resume with the settings of the checkpoint"
                raise InputError(f"{name} of shape {tuple(mine.shape)} in the checkpoint", got, fix)
        for name, mine in self.state().items():
            mine.copy_(state[name])

    def _encode(self, rows: Tensor, stage: int | None = None) -> Tensor:
        """Greedy codes `[N, S]`, or those of one stage alone, `[N, 1]`."""
        tables = self.tables if stage is None else self.tables[stage, None]
        book = torch.arange(len(tables), device=rows.device)[:, None, None]
        return ops.encode(rows[None, None, :, None], tables, book)[0, 0, :, :, 0]


def _add_rows(sums: Tensor, index: Tensor, rows: Tensor) -> None:
    """`sums[index[i]] += rows[i]`, the same to the last bit every time."""
    if sums.device.type == "cpu":
        sums.index_add_(0, index, rows)
    else:
        _add_products(sums, index, rows)


def _add_products(sums: Tensor, index: Tensor, rows: Tensor) -> None:
    """The same as products with one-hot codes."""
    for some, part in zip(index.split(_BLOCK), rows.split(_BLOCK), strict=True):  # index_add_ there adds in any order
        sums.addmm_(torch.nn.functional.one_hot(some, len(sums)).T.to(rows.dtype), part)
