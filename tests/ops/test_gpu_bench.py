"""The GPU's benches, run small in Triton's interpreter: their figures say nothing here, their correctness checks do."""

from __future__ import annotations

import pytest
import torch

from kvfold.errors import InputError

pytest.importorskip("triton")
from kvfold.bench.gpu import bench_attend_gpu, bench_encode_gpu, bench_prefill_gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("rope", ["post", "pre", "center"])
def test_attention_is_timed_beside_its_rivals_and_checked(rope: str) -> None:
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 32, "stages": 3, "group": 16, "codebook_size": 16}
    (one,) = bench_attend_gpu([96], [2], [rope], repeats=1, backend="gpu", device=DEVICE, quiet=True, **sizes)
    assert one["max_rel_error"] < 1e-3
    assert min(one[name] for name in ("kvfold_ms", "sdpa_bf16_ms", "fp8_ms", "kivi2_ms", "floor_bytes_ms")) > 0
    assert one["bytes_codes"] == 2 * 2 * 96 * 2 * (3 * 2 * 4 / 8 + 2)
    assert one["speedup"] == one["sdpa_bf16_ms"] / one["kvfold_ms"]


def test_kivi_is_left_out_where_blocks_do_not_fit() -> None:
    sizes = {"heads": 2, "kv_heads": 2, "head_dim": 32, "stages": 2, "group": 16, "codebook_size": 16}
    (one,) = bench_attend_gpu([50], [1], ["post"], repeats=1, backend="gpu", device=DEVICE, quiet=True, **sizes)
    assert one["kivi2_ms"] is None


def test_sizes_that_do_not_fit_are_told() -> None:
    with pytest.raises(InputError, match="heads a multiple"):
        bench_attend_gpu([64], [1], ["post"], heads=3, kv_heads=2, device=DEVICE, quiet=True)


def test_encoding_is_timed_and_its_codes_checked() -> None:
    sizes = {"vectors": 64, "group": 8, "stages": 2, "codebook_size": 16}
    results = bench_encode_gpu([1, 2], repeats=1, backend="gpu", device=DEVICE, quiet=True, **sizes)
    assert [one["beam"] for one in results] == [1, 2]
    assert all(one["equal_codes"] == 1 for one in results)
    assert results[0]["floor_operations_ms"] < results[1]["floor_operations_ms"]


def test_the_share_of_coding_in_a_prompts_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_BACKEND", "naive")
    shape = {"hidden": 64, "intermediate": 64, "heads": 2, "kv_heads": 1, "tokens": 32}
    told = bench_prefill_gpu(device=DEVICE, repeats=1, stages=2, **shape)
    assert told["share"] == told["encode_ms"] / told["layer_ms"] > 0
