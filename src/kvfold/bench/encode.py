"""Vectors encoded a second, beside faiss's residual quantizer and vector-quantize-pytorch's, where those are installed.

All search the same codebooks, 8 stages of 256 codewords of 32 entries unless told otherwise, for vectors drawn as sums of
random codewords and noise. faiss: `ResidualQuantizer.compute_codes` with the same beam and number of threads.
vector-quantize-pytorch: `ResidualVQ.forward` in evaluation; greedy, so beside beam 1 only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from kvfold import ops
from kvfold.bench.timing import medians
from kvfold.ops import native
from kvfold.progress import Progress

BEAMS = (1, 4, 16)
VECTORS = 8192


def bench_encode(
    beams: Sequence[int] = BEAMS,
    *,
    vectors: int = VECTORS,
    group: int = 32,
    stages: int = 8,
    codebook_size: int = 256,
    repeats: int = 5,
    seed: int = 0,
    backend: str | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Measure every beam.

    Returns:
        One object a beam: `vectors_per_s`, and `faiss_vectors_per_s`, `vector_quantize_pytorch_vectors_per_s` (None where not
        installed or not offered; faiss with 256 codewords only), `mean_squared_error`, `faiss_mean_squared_error`,
        `equal_codes` (the share of vectors whose codes are those of the naive op), `threads`, `isa`.
    """
    torch.manual_seed(seed)
    deviation = 0.75 ** torch.arange(stages)
    tables = torch.randn(stages, codebook_size, group) * deviation[:, None, None]
    codes = torch.randint(codebook_size, (stages, vectors))
    rows = sum(tables[s][codes[s]] for s in range(stages)) + 0.3 * deviation[-1] * torch.randn(vectors, group)
    assert isinstance(rows, Tensor)
    book = torch.arange(stages).view(-1, 1, 1)
    results = []
    with Progress("bench encode", len(beams), quiet) as step, torch.no_grad():
        for beam in beams:
            run = _ours(rows, tables, book, beam, backend)
            ways: dict[str, Callable[[], Any]] = {"ours": run}
            faiss = _faiss(rows, tables, beam)
            if faiss is not None:
                ways["faiss"] = faiss
            other = _vector_quantize_pytorch(rows, tables) if beam == 1 else None
            if other is not None:
                ways["other"] = other
            found = run()
            naive = _ours(rows[:1024], tables, book, beam, "naive")()
            times = medians(ways, repeats)
            speed = {name: vectors / time * 1000 for name, time in times.items()}
            results.append(
                {
                    "beam": beam,
                    "vectors_per_s": speed["ours"],
                    "faiss_vectors_per_s": speed.get("faiss"),
                    "vector_quantize_pytorch_vectors_per_s": speed.get("other"),
                    "speedup": speed["ours"] / speed["faiss"] if faiss is not None else None,
                    "mean_squared_error": _error(rows, tables, found),
                    "faiss_mean_squared_error": None if faiss is None else _error(rows, tables, faiss()),
                    "equal_codes": float((found[:1024] == naive).all(-1).double().mean()),
                    "vectors": vectors,
                    "group": group,
                    "stages": stages,
                    "codebook_size": codebook_size,
                    "threads": torch.get_num_threads(),
                    "isa": native.isa(),
                }
            )
            step()
    return results


def _ours(rows: Tensor, tables: Tensor, book: Tensor, beam: int, backend: str | None) -> Callable[[], Tensor]:
    return lambda: ops.encode(rows[None, None, :, None], tables, book, beam, backend)[0, 0, :, :, 0]


def _faiss(rows: Tensor, tables: Tensor, beam: int) -> Callable[[], Tensor] | None:
    if find_spec("faiss") is None:
        return None
    import faiss

    stages, size, dim = tables.shape
    if size != 256:  # codes of other widths come back packed
        return None
    faiss.omp_set_num_threads(torch.get_num_threads())
    quantizer = faiss.ResidualQuantizer(dim, stages, 8)
    quantizer.max_beam_size = beam
    faiss.copy_array_to_vector(tables.flatten().numpy(), quantizer.codebooks)
    quantizer.is_trained = True
    data = rows.numpy()
    return lambda: torch.from_numpy(quantizer.compute_codes(data)).int()


def _vector_quantize_pytorch(rows: Tensor, tables: Tensor) -> Callable[[], Tensor] | None:
    if find_spec("vector_quantize_pytorch") is None:
        return None
    from vector_quantize_pytorch import ResidualVQ

    stages, size, dim = tables.shape
    model = ResidualVQ(dim=dim, num_quantizers=stages, codebook_size=size).eval()
    for layer, table in zip(model.layers, tables, strict=True):
        layer._codebook.embed.data.copy_(table[None])
        layer._codebook.initted.data.fill_(True)
    return lambda: model(rows[None])[1][0].int()


def _error(rows: Tensor, tables: Tensor, codes: Tensor) -> float:
    decoded = sum(tables[s][codes[:, s].long()] for s in range(len(tables)))
    return float((rows - decoded).square().mean())
