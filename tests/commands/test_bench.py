"""`kvfold bench`."""

from __future__ import annotations

from collections.abc import Callable

from command_world import Ran, World


def test_bench_generate_measures_both_caches(run: Callable[..., Ran], world: World) -> None:
    given = ["bench", "generate", world.model, "--codec", world.codec, "--contexts", "90", "--new-tokens", "6"]
    ours, plain = run(*given, "--repeats", "1", "--text", world.text, "--threads", "1", "--json", "-").json
    assert [(r["context"], r["cache"], r["dtype"]) for r in (ours, plain)] == [
        (90, "kvfold", "float32"),
        (90, "plain", "float32"),
    ]
    numbers = 3 * 2 * 2 * 16  # layers, keys and values, KV heads, head dim
    assert plain["bytes_cache"] == 96 * numbers * 4
    coded = (96 - 4 - 64) // 16 * 16
    assert ours["bytes_cache"] == (96 - coded) * numbers * 4 + coded * numbers * 2 // 8  # 2 bits a number
    for result in (ours, plain):
        assert result["tokens_per_s"] > 0
        assert result["prefill_s"] > 0
        assert result["peak_rss_bytes"] >= result["loaded_rss_bytes"] > 1 << 20
