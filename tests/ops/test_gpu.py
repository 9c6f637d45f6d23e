"""Triton's kernels beyond the laws of every backend: they compile for an H100, write what they allocate, ask nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from coded import scattered
from torch import Tensor

from kvfold import ops

pytest.importorskip("triton")
from kvfold.ops.attend import gpu, gpu_step, naive

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def coded(heads: int, tokens: int, dim: int, size: int = 20, stages: int = 3, byte_scale: bool = False) -> ops.Coded:
    """Of 2 rows; a scale of a byte is any byte."""
    made = scattered(2, heads, tokens, dim, 8, size, stages)
    return made._replace(scale=(made.scale * 64).to(torch.uint8)) if byte_scale else made


def unit(coded: ops.Coded) -> ops.Coded:
    """With channels of variance 1, as vectors over their scale have: float16 rounds sums relative to their size."""
    return coded._replace(codebooks=(coded.codebooks.float() * len(coded.book) ** -0.5).half())


def on_device(coded: ops.Coded) -> ops.Coded:
    return ops.Coded(*(x.to(DEVICE) if isinstance(x, Tensor) else x for x in coded))


def check(
    query: Tensor, key: ops.Coded, value: ops.Coded, rotation: ops.Rotation | None, mask: Tensor | None, error: float = 1e-3
) -> None:
    turned = None if rotation is None else ops.Rotation(*(x.to(DEVICE) if isinstance(x, Tensor) else x for x in rotation))
    shown = None if mask is None else mask.to(DEVICE)
    scale = query.shape[-1] ** -0.5
    out, lse = gpu.attend(query.to(DEVICE), on_device(key), on_device(value), turned, shown, scale)
    right, right_lse = naive.attend(query, key, value, rotation, mask, scale)
    assert float((out.cpu() - right).norm() / right.norm()) < error
    assert torch.allclose(lse.cpu(), right_lse, rtol=0, atol=2e-3)  # sines of half precision queries are in float16


def test_every_kernel_compiles_for_an_h100() -> None:
    """The interpreter accepts more than the compiler. Compiled as launched on a GPU, in a process that does not interpret."""
    there = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_gpu.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=there)
    assert done.returncode == 0, done.stderr[-2000:]
    made = {line.split()[1].rstrip(":") for line in done.stdout.splitlines() if line.startswith("compiled")}
    step = {"_queries", "_scores", "_tables", "_look_up", "_mix", "_join"}
    assert made == step | {"_attend", "_scaled", "_greedy", "_beam", "_decode"}


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("queries", [1, 3])
def test_head_dims_of_real_models(dim: int, queries: int) -> None:
    key, value = coded(1, 70, dim), coded(1, 70, dim, byte_scale=True)
    rotation = ops.Rotation(torch.arange(70)[None], 100.0 ** -torch.linspace(0, 1, dim // 2), 1.0, False)
    query = torch.randn(2, 2, queries, dim).half()
    check(query, key, value, rotation, None)
    check(query, key, value, None, None)


@pytest.mark.parametrize("rope", ["post", "pre", "center"])
@pytest.mark.parametrize(("heads", "queries", "groups"), [(1, 1, 4), (3, 2, 2), (5, 3, 1), (16, 1, 8)])
def test_a_step_in_half_precision(rope: str, heads: int, queries: int, groups: int) -> None:
    """Codes of a byte and powers of 2 have kernels of their own: rows by tables or not, splits, masks, stages left over."""
    dim, tokens = 16 * groups, 700
    key, value = (unit(scattered(2, 2, tokens, dim, 16, 256, stages)) for stages in (5, 11))
    query = torch.randn(2, 2 * heads, queries, dim).bfloat16()
    assert gpu_step.takes(query, key, value)
    positions = torch.arange(tokens) + (torch.arange(tokens) > 333) * 1000  # a gap within a tile
    angles = 100.0 ** -torch.linspace(0, 1, dim // 2 - 1)  # and channels that are not rotated
    rotation = None if rope == "post" else ops.Rotation(positions[None], angles, 1.2, False)
    if rope == "center":
        key = key._replace(center=torch.randn(2, dim))
    mask = torch.rand(2, 1, queries, tokens) < 0.5
    mask[0, :, :, :600] = False
    check(query, key, value, rotation, None, 1.5e-3)  # eleven codewords summed in float16
    check(query, key, value, rotation, mask, 1.5e-3)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_step_at_other_positions(interleaved: bool) -> None:
    """Rows of a batch begin anywhere, and angles are large."""
    tokens = 300
    key, value = (unit(scattered(2, 1, tokens, 32, 16, 256, 3)) for _ in range(2))
    positions = torch.arange(tokens) + torch.tensor([[0], [100000]])
    rotation = ops.Rotation(positions, 0.5 ** torch.arange(16), 1.0, interleaved)  # exact products, as float32 has them
    check(torch.randn(2, 2, 1, 32).half(), key, value, rotation, None)


@pytest.mark.parametrize("group_size", [1, 2, 3, 7, 16])
def test_group_sizes(group_size: int) -> None:
    check(torch.randn(2, 2 * group_size, 1, 16), coded(2, 90, 16), coded(2, 90, 16), None, None)


@pytest.mark.parametrize("size", [2, 300, 2048])
def test_codes_of_other_widths(size: int) -> None:
    check(torch.randn(2, 4, 1, 16), coded(2, 50, 16, size), coded(2, 50, 16, size), None, None)


def test_ragged_rows_and_sliding_windows_are_masks() -> None:
    tokens, queries = 200, 6
    at = torch.arange(tokens) - torch.arange(queries)[:, None] - tokens + queries
    mask = ((at <= 0) & (at > -40))[None, None].repeat(2, 1, 1, 1)
    mask[1, :, :, :170] = False  # a row of 30 tokens
    check(torch.randn(2, 4, queries, 16), coded(2, tokens, 16), coded(2, tokens, 16), None, mask)


def test_masks_in_place_of_spans_are_made_for_some_queries_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_MASKED_QUERIES", 4)
    query, key, value = torch.randn(2, 4, 10, 16).to(DEVICE), on_device(coded(2, 90, 16)), on_device(coded(2, 90, 16))
    ends = torch.arange(10, device=DEVICE) * 9
    spans = ops.Spans.of(torch.zeros_like(ends), ends, ends + 3, ends + 5)
    got = gpu.attend(query, key, value, None, spans, 0.25)
    right = gpu.attend(query, key, value, None, spans.mask(0, 90), 0.25)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, right, strict=True))


@pytest.mark.parametrize("processors", [1, 3, 64])
def test_splits_of_the_keys_do_not_show(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "processors", lambda device: processors)
    monkeypatch.setattr(gpu, "_blocks", lambda rows, width, half: (32, 16, 4))
    mask = torch.rand(2, 1, 1, 300) < 0.5
    mask[0, :, :, :128] = False  # whole splits that nothing is seen of
    check(torch.randn(2, 2, 1, 16), coded(1, 300, 16), coded(1, 300, 16), None, mask)
    check(torch.randn(2, 2, 10, 16), coded(1, 300, 16), coded(1, 300, 16), None, None)


def test_buffers_are_written_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated for results holds NaN, and so does what lies behind the last token."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **how: empty(*size, **how).fill_(float("nan")))
    key, value = coded(2, 100, 16), coded(2, 100, 16)
    for side in (key, value):
        side.scale[:, :, 75:] = float("nan")
    first = [side._replace(packed=side.packed[:, :, :75], scale=side.scale[:, :, :75]) for side in (key, value)]
    query = torch.randn(2, 4, 1, 16)
    out, lse = gpu.attend(query.to(DEVICE), *map(on_device, first), None, None, 0.25)
    monkeypatch.undo()
    right, right_lse = naive.attend(query, *first, None, None, 0.25)
    assert torch.allclose(out.cpu(), right, atol=1e-3)
    assert torch.allclose(lse.cpu(), right_lse, atol=1e-3)


def test_a_code_that_names_no_codeword_reads_nothing_outside() -> None:
    key, value = coded(2, 40, 16, size=20), coded(2, 40, 16, size=20)
    wild, last = key.packed.clone(), key.packed.clone()
    wild[..., 0] |= 31  # code 31 of 20
    last[..., 0] = (last[..., 0] & ~torch.tensor(31, dtype=torch.uint8)) | 19
    query = torch.randn(2, 4, 1, 16)
    results = [
        gpu.attend(query.to(DEVICE), on_device(key._replace(packed=packed)), on_device(value), None, None, 0.25)[0]
        for packed in (wild, last)
    ]
    assert torch.equal(*results)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="there is no CUDA device")
@pytest.mark.parametrize("rope", ["post", "pre", "center"])
@pytest.mark.parametrize("queries", [1, 128])
def test_real_shapes(rope: str, queries: int) -> None:
    from kvfold.bench.attend import random_codes, random_rotation

    with torch.device("cuda"):
        key, value = (random_codes(8, 32768, 128, 8, 256, 32, strided, 2) for strided in (True, False))
        rotation = None if rope == "post" else random_rotation(32768, 128)
        if rope == "center":
            key = key._replace(center=torch.randn(8, 128))
        query = torch.randn(2, 32, queries, 128).bfloat16()
    out, lse = ops.attend(query, key, value, rotation, None, 128**-0.5)
    right, right_lse = ops.attend(query, key, value, rotation, None, 128**-0.5, backend="naive")
    assert float((out - right).norm() / right.norm()) < 1e-3
    assert torch.allclose(lse, right_lse, rtol=0, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="there is no CUDA device")
def test_a_step_can_be_captured_in_a_graph() -> None:
    from kvfold.bench.attend import random_codes, random_rotation

    with torch.device("cuda"):
        key, value = (random_codes(8, 4096, 128, 8, 256, 32, strided, 2) for strided in (True, False))
        rotation, query = random_rotation(4096, 128), torch.randn(2, 32, 1, 128).bfloat16()
        vectors = torch.randn(2, 8, 16, 4, 32)

    def step() -> tuple[Tensor, Tensor]:
        codes = ops.encode(vectors, key.codebooks, key.book, 4)
        return ops.attend(query, key, value, rotation, None, 0.1)[0], codes

    for _ in range(2):
        expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.allclose(got[0], expected[0], atol=1e-5)
    assert torch.equal(got[1], expected[1])
