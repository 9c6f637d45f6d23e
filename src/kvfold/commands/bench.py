"""`kvfold bench`."""

from __future__ import annotations

import argparse

from kvfold.bench import bench_generate
from kvfold.codecs.artifact import load
from kvfold.commands.common import (
    check_json,
    check_record,
    emit,
    prepare,
    record_if_asked,
    table,
)


def bench_generation(args: argparse.Namespace) -> None:
    """`kvfold bench generate`."""
    load(args.codec)
    check_json(args)
    check_record(args, "bench-generate")
    prepare(args)
    results = bench_generate(
        args.model,
        args.codec,
        contexts=args.contexts,
        new_tokens=args.new_tokens,
        repeats=args.repeats,
        text=args.text,
        dtype=args.dtype,
        device=args.device,
        threads=args.threads,
    )
    units = [("tokens_per_s", 1, "tokens/s"), ("prefill_s", 1, "prefill s")]
    units += [("bytes_cache", 1 << 20, "cache MiB"), ("peak_rss_bytes", 1 << 20, "peak RSS MiB")]
    rows = [["context", "cache", *(title for _, _, title in units)]]
    for ours, plain in zip(results[::2], results[1::2], strict=True):
        for one in (ours, plain):
            name = "kvfold" if one is ours else f"plain {one['dtype']}"
            rows.append([str(one["context"]), name, *(f"{one[field] / unit:.2f}" for field, unit, _ in units)])
        rows.append(["", "kvfold/plain", *(f"{ours[field] / plain[field]:.3f}" for field, _, _ in units)])
    emit(args, results, table(rows))
    record_if_asked(args, "bench-generate", {"results": results})
