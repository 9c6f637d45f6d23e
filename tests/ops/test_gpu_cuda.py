"""The CUDA C++ step beyond the laws of every backend: its forms against plain PyTorch on a GPU; elsewhere, that it compiles."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from coded import coded
from torch import Tensor

from kvfold import ops

pytest.importorskip("triton")
from kvfold.ops.attend import gpu, gpu_cuda, gpu_step, naive

CXX = shutil.which(os.environ.get("CXX", "c++"))
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def compared(
    query: Tensor,
    key: ops.Coded,
    value: ops.Coded,
    rotation: ops.Rotation | None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    error: float = 1e-3,
) -> None:
    rows = query.shape[1] // key.packed.shape[1] * query.shape[2]
    turned = rotation is not None and key.center is None
    assert gpu_step.takes(query, key, value)
    assert gpu_cuda.takes(key, value, turned, rows)
    scale = query.shape[-1] ** -0.5
    out, lse = gpu.attend(query, key, value, rotation, mask, scale, softcap)
    right, right_lse = naive.attend(query, key, value, rotation, mask, scale, softcap)
    assert float((out - right).norm() / right.norm()) < error
    assert torch.allclose(lse, right_lse, rtol=error, atol=5e-3)


def turning(positions: Tensor, dim: int) -> ops.Rotation:
    return ops.Rotation(positions, 1e4 ** -(torch.arange(dim // 2) / (dim // 2)), 1.1, False)


def made(rope: str, tokens: int, dim: int, heads: int = 2, **how: Any) -> tuple[ops.Coded, ops.Coded, ops.Rotation | None]:
    key, value = (coded(2, heads, tokens, dim, strided=strided, **how) for strided in (True, False))
    if rope == "center":
        key = key._replace(center=torch.randn(heads, dim))
    return key, value, None if rope == "post" else turning(torch.arange(tokens)[None], dim)


class OnCpu:
    """Stands in for the driver and the compiler: `step.cu` compiled as C++ with `cuda_on_cpu.h`, run in this process."""

    FLAGS = "-std=c++17 -O1 -w -shared -fPIC -fno-gnu-unique -Wl,-Bsymbolic"  # libc has a function `step` too

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[tuple, dict[str, Any]] = {}
        for name in gpu_cuda._SOURCES:
            shutil.copy(Path(gpu_cuda.__file__).with_name(name), folder)
        shutil.copy(Path(__file__).with_name("cuda_on_cpu.h"), folder / "step_ptx.cuh")

    def kernels(self, device: torch.device, shared: int, names: tuple[tuple[str, int | str], ...]) -> dict[str, Any]:
        if names not in self._made:
            library = self._folder / f"{len(self._made)}.so"
            run = "launch<Step>({}, *step, {{x, y, z}}, threads, shared);"
            both = f"if (turning) {run.format('turns')} else {run.format('::step')}"
            library.with_suffix(".cpp").write_text(
                '#include "step.cu"\n'
                'extern "C" void run(int turning, int x, int y, int z, int threads, int shared, const Step* step) {'
                f"{both if dict(names)['TURNED'] else run.format('::step')} }}\n"
            )
            given = [f"-D{name}={it}" for name, it in names]
            command = [CXX, *self.FLAGS.split(), *given, "-o", library, library.with_suffix(".cpp")]
            done = subprocess.run(command, capture_output=True)
            assert done.returncode == 0, done.stderr.decode()[-2000:]
            loaded = ctypes.CDLL(str(library)).run
            self._made[names] = {"turns": functools.partial(loaded, 1), "step": functools.partial(loaded, 0)}
        return self._made[names]

    @staticmethod
    def launch(kernel: Any, grid: tuple[int, int, int], threads: int, shared: int, step: Any, device: torch.device) -> None:
        kernel(*grid, threads, shared, ctypes.byref(step))

    def take_over(self, monkeypatch: pytest.MonkeyPatch, room: int = 14) -> None:
        """From here on; with shared memory for `room` codebooks of 256, for five multiprocessors, in several splits."""
        monkeypatch.setattr(gpu_cuda, "_shared_memory", lambda _: room * 16384 + 3072)
        monkeypatch.setattr(gpu_cuda, "_kernels", self.kernels)
        monkeypatch.setattr(gpu_cuda, "_launch", self.launch)
        monkeypatch.setattr(gpu_cuda, "_OVERHEAD", 1)
        monkeypatch.setattr(gpu, "processors", lambda _: 5)


without_gpu = pytest.mark.skipif(torch.cuda.is_available() or CXX is None, reason="needs a C++ compiler; or runs on the GPU")


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> OnCpu:
    return OnCpu(tmp_path_factory.mktemp("step"))


@without_gpu
@pytest.mark.parametrize(
    ("rope", "dim", "rows", "queries", "tokens", "how", "room"),
    [
        ("pre", 128, 4, 1, 333, {}, 14),  # six stages twice, as on an H100
        ("pre", 64, 3, 2, 70, {"stages": 4, "size": 130}, 6),
        ("pre", 64, 1, 1, 1, {"stages": 4, "own": "heads"}, 8),
        ("post", 64, 4, 1, 700, {}, 14),
        ("post", 64, 3, 3, 90, {"stages": 6, "size": 200, "own": "groups"}, 14),
        ("center", 64, 2, 1, 41, {"stages": 2}, 14),
        ("post", 32, 1, 1, 13, {"stages": 4, "size": 256}, 14),
    ],
)
def test_its_laws_hold_without_a_gpu(
    rope: str,
    dim: int,
    rows: int,
    queries: int,
    tokens: int,
    how: Any,
    room: int,
    on_cpu: OnCpu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same source as C++: several splits, buffers and shared memory that hold NaN at first, masks, positions with gaps."""
    on_cpu.take_over(monkeypatch, room)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **how: empty(*size, **how).fill_(float("nan")))
    key, value, rotation = made(rope, tokens, dim, **how)
    query = torch.randn(2, 2 * rows, queries, dim).half()
    compared(query, key, value, rotation, error=1.5e-3)
    if rotation is not None:
        at = rotation.positions[0]
        apart = torch.stack((at, at + (at > 20) * 100 + 1000)).long()
        rotation = rotation._replace(positions=apart, inv_freq=0.5 ** torch.arange(dim // 2))
    mask = torch.rand(2, 1, queries, tokens) < 0.6
    byte = value._replace(scale=(value.scale.view(torch.int16) >> 7).to(torch.uint8))
    compared(query, key, byte, rotation, mask, softcap=3.0, error=1.5e-3)


@without_gpu
def test_what_it_finds_out_on_the_way(on_cpu: OnCpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that share no codebooks though there are few; rows that see nothing; a query that is no number."""
    on_cpu.take_over(monkeypatch)
    key, value, rotation = made("pre", 150, 64, stages=4)
    query = torch.randn(2, 4, 1, 64).half()
    compared(query, key._replace(book=torch.randint(4, key.book.shape)), value, rotation, error=2e-3)
    out, lse = gpu.attend(query, key, value, rotation, torch.zeros(2, 1, 1, 150, dtype=torch.bool), 0.1)
    assert not out.any()
    assert bool((lse == -torch.inf).all())
    query[1, 1] = float("nan")
    out, lse = gpu.attend(query, key, value, rotation, None, 0.1)
    assert bool(out[1, 1].isnan().all())
    assert bool(lse[1, 1].isnan().all())
    assert not out[0].isnan().any()


@pytest.fixture
def device() -> Any:
    with torch.device("cuda"):
        torch.manual_seed(0)
        yield


@pytest.mark.gpu
@on_gpu
@pytest.mark.usefixtures("device")
class TestOnTheGpu:
    @pytest.mark.parametrize("rope", ["post", "pre", "center"])
    @pytest.mark.parametrize(
        ("dim", "rows", "queries"), [(64, 3, 1), (128, 4, 1), (128, 1, 1), (256, 2, 1), (128, 4, 3), (64, 8, 2)]
    )
    def test_shapes(self, rope: str, dim: int, rows: int, queries: int) -> None:
        for tokens in (1, 13, 777, 5000):
            key, value, rotation = made(rope, tokens, dim, stages=4 if dim == 256 else 8)
            compared(torch.randn(2, 2 * rows, queries, dim).bfloat16(), key, value, rotation, error=1.5e-3)

    @pytest.mark.parametrize(("rope", "own"), [("post", "heads"), ("pre", "heads"), ("post", "groups")])
    def test_own_codebooks(self, rope: str, own: str) -> None:
        key, value, rotation = made(rope, 1000, 128, own=own)
        compared(torch.randn(2, 8, 1, 128).half(), key, value, rotation)

    def test_groups_that_do_not_share(self) -> None:
        """As many codebooks as stages and heads, but not one a stage: what a GPU can only find out on the way."""
        key, value, rotation = made("pre", 1000, 128)
        key = key._replace(book=torch.randint(8, key.book.shape))
        compared(torch.randn(2, 8, 1, 128).half(), key, value, rotation, error=2e-3)

    @pytest.mark.parametrize("rope", ["post", "pre"])
    def test_few_codewords_and_scales_of_a_byte(self, rope: str) -> None:
        key, value, rotation = made(rope, 900, 128, size=130, stages=3)
        key, value = (side._replace(scale=(side.scale.view(torch.int16) >> 7).to(torch.uint8)) for side in (key, value))
        compared(torch.randn(2, 8, 1, 128).half(), key, value, rotation)

    @pytest.mark.parametrize("rope", ["post", "pre", "center"])
    def test_masks_and_caps(self, rope: str) -> None:
        key, value, rotation = made(rope, 700, 64)
        query = torch.randn(2, 6, 2, 64).bfloat16()
        mask = torch.rand(2, 1, 2, 700) < 0.5
        mask[0, :, :, :600] = False
        compared(query, key, value, rotation, mask)
        compared(query, key, value, rotation, mask[:1], softcap=2.0)
        compared(query, key, value, rotation, None, softcap=2.0)

    def test_nothing_seen(self) -> None:
        key, value, rotation = made("pre", 300, 64)
        mask = torch.zeros(2, 1, 1, 300, dtype=torch.bool)
        out, lse = gpu.attend(torch.randn(2, 6, 1, 64).half(), key, value, rotation, mask, 0.1)
        assert not out.any()
        assert bool((lse == -torch.inf).all())

    @pytest.mark.parametrize("first", [0, 100_000])
    def test_any_positions(self, first: int) -> None:
        """Gaps within 8 keys, rows of a batch of their own, two query rows with channels that are not rotated."""
        key, value, _ = made("post", 400, 64)
        at = torch.arange(400)
        positions = torch.stack((at + (at > 203) * 1000, first + at * 3))
        angles = 0.5 ** torch.arange(30)  # exact products
        for interleaved in (False, True):
            for kind in (torch.int32, torch.int64):
                compared(
                    torch.randn(2, 4, 1, 64).half(), key, value, ops.Rotation(positions.to(kind), angles, 1.0, interleaved)
                )

    @pytest.mark.parametrize("rope", ["post", "pre"])
    def test_few_keys_that_matter_and_scales_far_apart(self, rope: str) -> None:
        """Weights are integers: those of a row must not drown in rounding where another key's scale is large."""
        key, value, rotation = made(rope, 6000, 128)
        scale = value.scale.float() * 10.0 ** torch.empty_like(value.scale, dtype=torch.float32).uniform_(-4, 2)
        value = value._replace(scale=scale.half())
        compared(torch.randn(2, 8, 1, 128).half(), key, value, rotation, error=2e-3)
        compared(torch.randn(2, 8, 1, 128).half() * 10, key, value, rotation, error=2e-2)  # logits of 40: float16's tables
        key = key._replace(scale=key.scale * 0)  # all keys count the same
        compared(torch.randn(2, 8, 1, 128).half(), key, value, rotation)
        out, _ = gpu.attend(torch.randn(2, 8, 1, 128).half(), key, value._replace(scale=scale.half() * 0), rotation, None, 0.1)
        assert not out.any()

    @pytest.mark.parametrize("rope", ["post", "pre", "center"])
    def test_it_writes_all_it_allocates_and_repeats_itself(self, rope: str, monkeypatch: pytest.MonkeyPatch) -> None:
        key, value, rotation = made(rope, 3001, 128)
        for side in (key, value):
            side.scale[:, :, 2900:] = float("nan")
        short = [side._replace(packed=side.packed[:, :, :2900], scale=side.scale[:, :, :2900]) for side in (key, value)]
        rotation = None if rotation is None else rotation.slice(0, 2900)
        query = torch.randn(2, 12, 1, 128).half()
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *size, **how: empty(*size, **how).fill_(float("nan")))
        first = gpu.attend(query, *short, rotation, None, 0.1)
        again = gpu.attend(query, *short, rotation, None, 0.1)
        monkeypatch.undo()
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
        compared(query, *short, rotation)

    def test_nan_stays(self) -> None:
        key, value, rotation = made("pre", 100, 64)
        query = torch.randn(2, 2, 1, 64).half()
        query[1, 1] = float("nan")
        out, lse = gpu.attend(query, key, value, rotation, None, 0.1)
        assert bool(out[1, 1].isnan().all())
        assert bool(lse[1, 1].isnan().all())
        assert not out[0].isnan().any()

    def test_triton_says_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        key, value, rotation = made("pre", 2000, 128)
        query = torch.randn(2, 8, 1, 128).half()
        here, _ = gpu.attend(query, key, value, rotation, None, 0.1)
        monkeypatch.setattr(gpu_cuda, "takes", lambda *_: False)
        there, _ = gpu.attend(query, key, value, rotation, None, 0.1)
        assert float((here - there).norm() / there.norm()) < 1e-3


@pytest.mark.parametrize(("blocks", "tokens"), [(1, 1), (8, 1000), (128, 32768), (8, 131072), (500, 70)])
def test_splits_are_whole_and_leave_nobody_idle(blocks: int, tokens: int) -> None:
    splits, each = gpu_cuda._splits(blocks, tokens, 132)
    assert each % 128 == 0
    assert each * (splits - 1) < tokens <= each * splits
    if blocks * tokens > 1 << 20:
        rounds = -(-blocks * splits // 132)
        assert blocks * tokens / (132 * rounds * each) > 0.9


def test_it_is_not_for_a_cpu() -> None:
    key, value, rotation = made("pre", 20, 64)
    assert rotation is not None
    assert not gpu_cuda.takes(key, value, True, 4)


@pytest.mark.skipif(not gpu_cuda.can_compile(90), reason="needs cuda-bindings and NVRTC (nvidia-cuda-nvrtc)")
def test_every_form_compiles_for_an_h100() -> None:
    for turned, rows, kind, load, size in (
        (True, 4, "u16", 16, 256),
        (True, 1, "u8", 4, 20),
        (False, 4, "u8", 8, 256),
        (False, 2, "u16", 4, 20),
    ):
        form = {"STAGES": 8, "GROUPS": 4, "SIZE": size, "SCALE": kind, "LOAD": load}
        names = {f"{side}_{name}": it for side in "KV" for name, it in form.items()} | {
            **{"ROWS": rows, "TALL": rows, "WARPS": gpu_cuda._WARPS[turned], "TURNED": int(turned), "TWICE": 6},
            **{"POSITION": "i64", "MORE": int(not turned), "MASKED": int(load == 4), "CAPPED": int(load == 4)},
        }
        assert len(gpu_cuda.compiled(tuple(names.items()), "90")) > 1000
