"""`kvfold bench`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kvfold.bench import bench_attend, bench_encode, bench_generate
from kvfold.bench.attend import CONTEXTS
from kvfold.bench.encode import VECTORS
from kvfold.bench.plot import plot_times
from kvfold.bench.serve import bench_serve
from kvfold.commands.common import (
    check_outputs,
    chosen_codecs,
    emit,
    picture,
    prepare,
    record_if_asked,
    table,
)
from kvfold.errors import InputError


def bench_generation(args: argparse.Namespace) -> None:
    """`kvfold bench generate`."""
    beam = dict(chosen_codecs(args).settings)["beam"] if args.changes else None
    check_outputs(args, "bench-generate")
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
        beam=beam,
    )
    units = [("tokens_per_s", 1, "tokens/s"), ("prefill_s", 1, "prefill s")]
    units += [("bytes_cache", 1 << 20, "cache MiB"), ("peak_rss_bytes", 1 << 20, "peak RSS MiB")]
    rows = [["context", "cache", *(title for _, _, title in units)]]
    for ours, plain in zip(results[::2], results[1::2], strict=True):
        for one in (ours, plain):
            name = "kvfold" if one is ours else f"plain {one['dtype']}"
            rows.append([str(one["context"]), name, *(f"{one[field] / unit:.2f}" for field, unit, _ in units)])
        rows.append(["", "kvfold/plain", *(f"{ours[field] / plain[field]:.3f}" for field, _, _ in units)])
    shares = [
        f"{one['context']} tokens: encoding takes {one['encode_s']:.3f} s, {one['encode_share']:.1%} of the plain prefill"
        for one in results
        if one["encode_s"] is not None
    ]
    emit(args, results, "\n".join([table(rows), *shares]))
    record_if_asked(args, "bench-generate", {"results": results})


_TITLES = {"pre": "keys coded before RoPE", "post": "keys coded after RoPE", "center": "after RoPE, around a center"}
_TIMES = {
    "kvfold_ms": "kvfold",
    "dense_bf16_ms": "dense bf16",
    "read_bf16_ms": "reading the dense cache once",
    "read_codes_ms": "reading the codes once",
}


def bench_attention(args: argparse.Namespace) -> None:
    """`kvfold bench attend`."""
    check_outputs(args, "bench-attend")
    prepare(args)
    sizes = {name: getattr(args, name) for name in ("heads", "kv_heads", "head_dim", "stages", "codebook_size", "group")}
    if args.device != "cpu":
        _attention_on_gpu(args, sizes)
        return
    if args.batches is not None:
        raise InputError("--batches with a GPU", f"--device {args.device}", "leave it out, or add --device cuda")
    contexts = sorted(set(args.contexts or CONTEXTS))
    results = bench_attend(contexts, args.ropes, repeats=args.repeats, seed=args.seed, backend=args.backend, **sizes)
    rows = [["context", "keys", "kvfold", "sdpa bf16", "matmul bf16", "read bf16", "read codes", "speed-up", "error"]]
    for one in results:
        fields = ("kvfold_ms", "sdpa_bf16_ms", "matmul_bf16_ms", "read_bf16_ms", "read_codes_ms")
        times = [f"{one[field]:.2f}" for field in fields]
        rows.append(
            [str(one["context"]), f"{one['rope']}-RoPE", *times, f"{one['speedup']:.2f}", f"{one['max_rel_error']:.1e}"]
        )
    first = results[0]
    head = f"milliseconds, {first['threads']} threads, {first['isa']}; speed-up over the faster of the two dense ways"
    emit(args, results, f"{head}\n{table(rows)}")
    record_if_asked(args, "bench-attend", {"results": results})
    if args.plot:
        panels = {
            _TITLES[rope]: {title: [one[field] for one in results if one["rope"] == rope] for field, title in _TIMES.items()}
            for rope in args.ropes
        }
        picture(lambda: plot_times(panels, contexts, Path(args.plot)), Path(args.plot))


def _attention_on_gpu(args: argparse.Namespace, sizes: dict[str, Any]) -> None:
    from kvfold.bench.gpu import BATCHES, bench_attend_gpu
    from kvfold.bench.gpu import CONTEXTS as LONGER

    if args.plot:
        raise InputError("--plot with the CPU", f"--device {args.device}", "leave it out; --json has the figures")
    contexts, batches = sorted(set(args.contexts or LONGER)), args.batches or BATCHES
    how = {"repeats": args.repeats, "seed": args.seed, "backend": args.backend, "device": args.device}
    results = bench_attend_gpu(contexts, batches, args.ropes, **how, **sizes)
    fields = ("kvfold_ms", "sdpa_bf16_ms", "fp8_ms", "kivi2_ms", "floor_bytes_ms", "floor_operations_ms")
    heads = ["kvfold", "sdpa bf16", "fp8", "kivi 2 bits", "floor, bytes", "floor, products"]
    rows = [["context", "batch", "keys", *heads, "speed-up", "GB/s", "error"]]
    for one in results:
        times = ["-" if one[field] is None else f"{one[field]:.3f}" for field in fields]
        last = [f"{one['speedup']:.2f}", f"{one['codes_gb_per_s']:.0f}", f"{one['max_rel_error']:.1e}"]
        rows.append([str(one["context"]), str(one["batch"]), f"{one['rope']}-RoPE", *times, *last])
    first = results[0]
    head = f"milliseconds, {first['device']}, copies at {first['copy_gb_per_s']:.0f} GB/s; speed-up over SDPA in bfloat16"
    emit(args, results, f"{head}\n{table(rows)}")
    record_if_asked(args, "bench-attend", {"results": results})


def bench_encoding(args: argparse.Namespace) -> None:
    """`kvfold bench encode`."""
    check_outputs(args, "bench-encode")
    prepare(args)
    sizes = {name: getattr(args, name) for name in ("group", "stages", "codebook_size")}
    if args.device != "cpu":
        _encoding_on_gpu(args, sizes)
        return
    sizes["vectors"] = args.vectors or VECTORS
    results = bench_encode(args.beams, repeats=args.repeats, seed=args.seed, backend=args.backend, **sizes)
    rows = [["beam", "kvfold", "faiss", "vector-quantize-pytorch", "over faiss", "equal codes"]]
    for one in results:
        fields = ("vectors_per_s", "faiss_vectors_per_s", "vector_quantize_pytorch_vectors_per_s")
        speeds = ["-" if one[field] is None else f"{one[field]:,.0f}" for field in fields]
        over = "-" if one["speedup"] is None else f"{one['speedup']:.2f}"
        rows.append([str(one["beam"]), *speeds, over, f"{one['equal_codes']:.4f}"])
    first = results[0]
    emit(args, results, f"vectors a second, {first['threads']} threads, {first['isa']}\n{table(rows)}")
    record_if_asked(args, "bench-encode", {"results": results})


def _encoding_on_gpu(args: argparse.Namespace, sizes: dict[str, Any]) -> None:
    from kvfold.bench.gpu import VECTORS as MORE
    from kvfold.bench.gpu import bench_encode_gpu, bench_prefill_gpu

    how = {"repeats": args.repeats, "seed": args.seed, "backend": args.backend, "device": args.device}
    results = bench_encode_gpu(args.beams, vectors=args.vectors or MORE, **how, **sizes)
    rows = [["beam", "kvfold", "plain PyTorch", "floor, products", "floor, bytes", "equal codes"]]
    for one in results:
        times = [f"{one[name]:.3f}" for name in ("kvfold_ms", "naive_ms", "floor_operations_ms", "floor_bytes_ms")]
        rows.append([str(one["beam"]), *times, f"{one['equal_codes']:.4f}"])
    prefill = bench_prefill_gpu(device=args.device, seed=args.seed)
    told = (
        f"a layer of Llama 3 8B's shape reads {prefill['tokens']} tokens in {prefill['layer_ms']:.2f} ms; coding its keys and "
        f"values takes {prefill['encode_ms']:.2f} ms, {prefill['share']:.1%} of that"
    )
    head = f"milliseconds for {results[0]['vectors']:,} vectors, {results[0]['device']}"
    emit(args, {"encode": results, "prefill": prefill}, f"{head}\n{table(rows)}\n\n{told}")
    record_if_asked(args, "bench-encode", {"results": results, "prefill": prefill})


def bench_serving(args: argparse.Namespace) -> None:
    """`kvfold bench serve`."""
    chosen_codecs(args)
    check_outputs(args, "bench-serve")
    prepare(args)
    results = bench_serve(
        args.model,
        args.codec,
        requests=args.requests,
        context=args.context,
        new_tokens=args.new_tokens,
        repeats=args.repeats,
        text=args.text,
        dtype=args.dtype,
        device=args.device,
        cache_gib=args.cache_gib,
        beam=int(dict(args.changes)["beam"]) if args.changes else None,
    )
    rows = [["cache", "tokens that fit", "prefill s", "tokens/s", "speed-up"]]
    for one in results:
        name = "kvfold" if one["cache"] == "kvfold" else f"vLLM's, {one['dtype']}"
        speeds = [f"{one['prefill_s']:.1f}", f"{one['tokens_per_s']:.2f}", f"{one['speedup']:.2f}"]
        rows.append([name, f"{one['capacity']:,}", *speeds])
    first = results[0]
    head = f"{first['requests']} requests of {first['context']} tokens together, {first['new_tokens']} decoded after each"
    head += f"; threads of vLLM's worker: {first['threads']}"
    emit(args, results, f"{head}\n{table(rows)}")
    record_if_asked(args, "bench-serve", {"results": results})
