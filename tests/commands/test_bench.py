"""`kvfold bench`."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command_world import Ran, World, refused

from kvfold.bench import serve
from kvfold.ops import native

NEEDS_NATIVE = pytest.mark.skipif(not native.available_isas(), reason=native.MISSING)


def test_bench_generate_measures_both_caches(run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    given = ["bench", "generate", world.model, "--codec", world.codec, "--contexts", "90", "--new-tokens", "6"]
    given += ["--repeats", "1", "--text", world.text, "--threads", "1", "--set", "beam=3"]
    assert "90 tokens: encoding takes" in run(*given, "--json", str(tmp_path / "told.json")).out
    ours, plain = json.loads((tmp_path / "told.json").read_text())
    assert [(r["context"], r["cache"], r["dtype"]) for r in (ours, plain)] == [
        (90, "kvfold", "float32"),
        (90, "plain", "float32"),
    ]
    numbers = 3 * 2 * 2 * 16  # layers, keys and values, KV heads, head dim
    assert plain["bytes_cache"] == 96 * numbers * 4
    coded = (96 - 4 - 64) // 16 * 16
    assert (
        ours["bytes_cache"] == (96 - coded) * numbers * 4 + coded * numbers * 7 // 32
    )  # 1.5 bits a number of keys, 2 of values
    assert 0 < ours["encode_s"] < ours["prefill_s"]
    assert ours["encode_share"] == ours["encode_s"] / plain["prefill_s"]
    assert plain["encode_s"] is None
    for result in (ours, plain):
        assert result["tokens_per_s"] > 0
        assert result["prefill_s"] > 0
        assert result["peak_rss_bytes"] >= result["loaded_rss_bytes"] > 1 << 20


def test_bench_generate_refuses_settings_but_the_beam(run: Callable[..., Ran], world: World) -> None:
    refused(run("bench", "generate", world.model, "--codec", world.codec, "--set", "stages=3"), "only beam")


SIZES = ["--heads", "4", "--kv-heads", "2", "--head-dim", "64", "--repeats", "1", "--threads", "1"]


@NEEDS_NATIVE
def test_bench_attend_measures_both_ropes_and_checks_first(run: Callable[..., Ran], tmp_path: Path) -> None:
    plot = tmp_path / "times.png"
    results = run("bench", "attend", "--contexts", "300,700", *SIZES, "--plot", str(plot), "--json", "-").json
    assert [(r["context"], r["rope"]) for r in results] == [(300, "post"), (300, "pre"), (700, "post"), (700, "pre")]
    for result in results:
        assert result["dense_bf16_ms"] == min(result["sdpa_bf16_ms"], result["matmul_bf16_ms"])
        assert min(result["kvfold_ms"], result["read_bf16_ms"], result["read_codes_ms"]) > 0
        assert result["max_rel_error"] <= 1e-3
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "speed-up" in run("bench", "attend", "--contexts", "300", "--rope", "pre", *SIZES).out
    assert "center-RoPE" in run("bench", "attend", "--contexts", "300", "--rope", "center", *SIZES).out


@NEEDS_NATIVE
def test_bench_encode_measures_every_beam(run: Callable[..., Ran]) -> None:
    sizes = ["--vectors", "200", "--group", "8", "--stages", "3", "--codebook-size", "16", "--repeats", "1", "--threads", "1"]
    results = run("bench", "encode", "--beams", "1,3", *sizes, "--json", "-").json
    assert [r["beam"] for r in results] == [1, 3]
    assert results[1]["mean_squared_error"] < results[0]["mean_squared_error"]
    for result in results:
        assert result["vectors_per_s"] > 0
        assert result["equal_codes"] == 1
    assert "equal codes" in run("bench", "encode", "--beams", "2", *sizes).out


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["attend", "--heads", "5", "--kv-heads", "2"], "a multiple of kv-heads"),
        (["attend", "--head-dim", "48"], "head-dim of group"),
        (["attend", "--rope", "middle"], "rope pre, post or center"),
        (["attend", "--backend", "fpga"], "fpga"),
        (["attend", "--batches", "1,4"], "--batches with a GPU"),
        (["attend", "--device", "meta", "--plot", "x.png"], "--plot with the CPU"),
        (["encode", "--backend", "fpga"], "fpga"),
        (["encode", "--beams", "0"], "at least 1"),
    ],
)
def test_bench_refuses(run: Callable[..., Ran], argv: list[str], told: str) -> None:
    refused(run("bench", *argv, "--repeats", "1"), told)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is there")
def test_bench_serve_without_vllm_says_what_to_install(run: Callable[..., Ran], world: World) -> None:
    refused(run("bench", "serve", world.model, "--codec", world.codec), "the package vllm")


def test_bench_serve_refuses_sizes_before_an_engine_starts(
    run: Callable[..., Ran], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: name)
    given = ["bench", "serve", world.model, "--codec", world.codec]
    refused(run(*given, "--context", "512"), "within the model's 512")
    refused(run(*given, "--context", "400", "--requests", "5000", "--text", world.text), "text of at least")
