"""The ops on a GPU, beside PyTorch on uncompressed caches and the floors of memory and arithmetic, measured in the same run.

A way is timed as a CUDA graph where it can be captured, so that launches from Python do not count for or against it, and before
every timed run a buffer larger than the second-level cache is written, because in a model the other layers' caches pass through
it between two steps. A floor is what the bytes or the multiply-adds of an op would take at the speed of a plain copy, or of
PyTorch's matrix product, on this device.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfold import ops
from kvfold.bench.attend import check_sizes, dense_cache, random_codes, random_rotation, worst_error
from kvfold.bench.timing import medians
from kvfold.codecs import build_codec, resolve_settings
from kvfold.codecs.base import Reader
from kvfold.codecs.residual import ResidualCodec
from kvfold.progress import Progress

CONTEXTS = (1024, 4096, 32768, 131072)
BATCHES = (1, 16)
VECTORS = 1 << 20
PREFILL = {"hidden": 4096, "intermediate": 14336, "heads": 32, "kv_heads": 8, "tokens": 8192}  # a layer of Llama 3 8B
_FLUSHED = 1 << 28  # bytes
_NAIVE_SHARE = 16  # one of so many vectors is encoded by plain PyTorch
_KIVI_TOKENS = 1 << 19  # keys of all rows at most: coding them takes float32 copies


def bench_attend_gpu(
    contexts: Sequence[int] = CONTEXTS,
    batches: Sequence[int] = BATCHES,
    ropes: Sequence[str] = ("post", "pre"),
    *,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    stages: int = 8,
    codebook_size: int = 256,
    group: int = 32,
    repeats: int = 20,
    seed: int = 0,
    backend: str | None = None,
    device: str = "cuda",
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Measure a decode step of one layer at every context, batch and `rope` (see `bench_attend`), queries in bfloat16.

    Returns:
        One object each: `kvfold_ms`; `sdpa_bf16_ms` (`scaled_dot_product_attention`, the faster of `enable_gqa` and grouped
        queries), `fp8_ms` (the same on a cache in float8, widened first), `kivi2_ms` (kvfold's codec `kivi`, 2 bits; None for
        more than 2^19 keys); `speedup` over SDPA; `bytes_codes`, `codes_gb_per_s`, `copy_gb_per_s`; `floor_bytes_ms`,
        `floor_operations_ms`; `max_rel_error` against the naive op, root mean squares, the worst head.

    Raises:
        InputError: sizes that do not fit together.
    """
    check_sizes(heads, kv_heads, head_dim, group, ropes)
    copied, multiplied = _copy_speed(device), _product_speed(device, torch.bfloat16)
    results = []
    with Progress("bench attend", len(contexts) * len(batches) * len(ropes), quiet) as step, torch.no_grad():
        for context in contexts:
            for batch in batches:
                for rope in ropes:
                    torch.manual_seed(seed)
                    with torch.device(device):
                        key, value = (
                            random_codes(kv_heads, context, head_dim, stages, codebook_size, group, strided, batch)
                            for strided in (True, False)
                        )
                        rotation = None if rope == "post" else random_rotation(context, head_dim)
                        if rope == "center":
                            key = key._replace(center=torch.randn(kv_heads, head_dim))
                        query = torch.randn(batch, heads, 1, head_dim).bfloat16()
                    measured = _attend(query, key, value, rotation, repeats, backend)
                    size = sum(t.numel() * t.element_size() for side in (key, value) for t in (side.packed, side.scale))
                    products = (2 if rope == "pre" else 1) + 1
                    operations = 2 * products * batch * heads * context * head_dim
                    results.append(
                        {"context": context, "batch": batch, "rope": rope, **measured}
                        | {"bytes_codes": size, "codes_gb_per_s": size / measured["kvfold_ms"] / 1e6, "copy_gb_per_s": copied}
                        | {"floor_bytes_ms": size / copied / 1e6, "floor_operations_ms": operations / multiplied * 1e3}
                        | {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "stages": stages}
                        | {"codebook_size": codebook_size, "group": group, "device": _name(device)}
                    )
                    step()
    return results


def _attend(
    query: Tensor, key: ops.Coded, value: ops.Coded, rotation: ops.Rotation | None, repeats: int, backend: str | None
) -> dict[str, Any]:
    scale, tokens = query.shape[-1] ** -0.5, key.packed.shape[2]
    arguments = (query, key, value, rotation, None, scale)
    right = ops.attend(*arguments, backend="naive")[0]
    out = ops.attend(*arguments, backend=backend)[0]
    keys, values = dense_cache(key, value, rotation)
    narrow_keys, narrow_values = keys.to(torch.float8_e4m3fn), values.to(torch.float8_e4m3fn)
    grouped = query.view(len(query), keys.shape[1], -1, query.shape[-1])
    ways: dict[str, Callable[[], Any]] = {
        "kvfold_ms": lambda: ops.attend(*arguments, backend=backend),
        "gqa": lambda: F.scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=True),
        "grouped": lambda: F.scaled_dot_product_attention(grouped, keys, values, scale=scale),
        "fp8_ms": lambda: F.scaled_dot_product_attention(
            grouped, narrow_keys.bfloat16(), narrow_values.bfloat16(), scale=scale
        ),
    }
    if len(query) * tokens <= _KIVI_TOKENS and tokens % 32 == 0:
        settings = resolve_settings("kivi", {"bits": 2, "group": 32}, query.shape[-1])
        codecs = [build_codec("kivi", side, query.shape[-1], settings) for side in ("key", "value")]
        coded = [(codec, codec.encode(x.float())) for codec, x in zip(codecs, (keys, values), strict=True)]
        reader = Reader(coded[0], coded[1], None)
        ways["kivi2_ms"] = lambda: reader.attend(query, None, scale, None)
    times = timed(ways, repeats, query.device)
    sdpa = min(times.pop("gqa"), times.pop("grouped"))
    error = worst_error(out, right)
    return {"kivi2_ms": None, **times, "sdpa_bf16_ms": sdpa, "speedup": sdpa / times["kvfold_ms"], "max_rel_error": error}


def bench_encode_gpu(
    beams: Sequence[int] = (1, 4, 16),
    *,
    vectors: int = VECTORS,
    group: int = 32,
    stages: int = 8,
    codebook_size: int = 256,
    repeats: int = 10,
    seed: int = 0,
    backend: str | None = None,
    device: str = "cuda",
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Measure every beam on bfloat16 vectors.

    Returns:
        One object a beam: `kvfold_ms`, `naive_ms` (plain PyTorch on the device, from a 16th of the vectors), `vectors_per_s`,
        `speedup` over naive; `floor_operations_ms` (one float16 product of every codeword and hypothesis), `floor_bytes_ms`;
        `statistics_ms` (what learning by moving average needs, in the same pass; None for a beam above 1); `equal_codes`, the
        share of 4,096 vectors whose codes are those of the naive op in float32.
    """
    from kvfold.ops.encode.gpu import encode_statistics  # Triton is optional

    torch.manual_seed(seed)
    copied, multiplied = _copy_speed(device), _product_speed(device, torch.float16)
    results = []
    with torch.device(device):
        tables = (torch.randn(stages, codebook_size, group) * 0.75 ** torch.arange(stages)[:, None, None]).half()
        rows = torch.randn(1, 1, vectors, 1, group).bfloat16()
        some = rows[:, :, : -(-vectors // _NAIVE_SHARE)]
        book = torch.arange(stages)[:, None, None]
    with Progress("bench encode", len(beams), quiet) as step, torch.no_grad():
        for beam in beams:
            found = ops.encode(rows[:, :, :4096], tables, book, beam, backend)
            right = ops.encode(rows[:, :, :4096], tables, book, beam, "naive")
            ways: dict[str, Callable[[], Any]] = {
                "kvfold_ms": lambda: ops.encode(rows, tables, book, beam, backend),  # noqa: B023 - run before the next
                "naive_ms": lambda: ops.encode(some, tables, book, beam, "naive"),  # noqa: B023
            }
            if beam == 1:
                ways["statistics_ms"] = lambda: encode_statistics(rows.view(-1, group), tables.float())
            times = timed(ways, repeats, rows.device)
            times["naive_ms"] *= vectors / some.shape[2]
            searched = 1 + (stages - 1) * beam
            operations = 2 * searched * codebook_size * group * vectors
            moved = rows.numel() * rows.element_size() + 4 * stages * vectors
            results.append(
                {"beam": beam, "statistics_ms": None, **times, "vectors_per_s": vectors / times["kvfold_ms"] * 1e3}
                | {"speedup": times["naive_ms"] / times["kvfold_ms"], "floor_bytes_ms": moved / copied / 1e6}
                | {"floor_operations_ms": operations / multiplied * 1e3}
                | {"equal_codes": float((found == right).flatten(3).all(-1).double().mean())}
                | {"vectors": vectors, "group": group, "stages": stages, "codebook_size": codebook_size}
                | {"device": _name(device)}
            )
            step()
    return results


def bench_prefill_gpu(
    *, device: str = "cuda", repeats: int = 5, stages: int = 8, beam: int = 1, seed: int = 0, **sizes: int
) -> dict[str, Any]:
    """What coding adds to a prompt's pass through one layer of the shape of Llama 3 8B (`PREFILL`), random weights, bfloat16.

    Returns:
        `layer_ms`, `encode_ms` (keys and values of that layer, scaling and packing included), `share`, their ratio.
    """
    from transformers import LlamaConfig, LlamaModel

    shape = {**PREFILL, **sizes}
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        num_hidden_layers=2,
        vocab_size=128,
        max_position_embeddings=shape["tokens"],
    )
    with torch.device(device):
        model = LlamaModel(config).bfloat16().eval().to(torch.device(device))
        ids = torch.randint(128, (1, shape["tokens"]))
        dim = shape["hidden"] // shape["heads"]
        states = torch.randn(1, shape["kv_heads"], shape["tokens"], dim).bfloat16()
    settings = {"stages": stages, "beam": beam, "codebook_size": 256, "scale_bits": 8, "group": 32}
    codec = build_codec("rvq-paper", "key", dim, resolve_settings("rvq-paper", settings, dim)).to(torch.device(device))
    assert isinstance(codec, ResidualCodec)
    tables = torch.randn(stages, 256, 32, device=device) * 0.75 ** torch.arange(stages, device=device)[:, None, None]
    codec = codec.with_tables(tables, shape["kv_heads"])

    def encode() -> None:
        for _ in range(2):
            codec.encode(states)

    with torch.no_grad():
        ways = {"layers_ms": lambda: model(input_ids=ids, use_cache=False), "encode_ms": encode}
        times = timed(ways, repeats, states.device)
    layer = times.pop("layers_ms") / 2
    return {"layer_ms": layer, **times, "share": times["encode_ms"] / layer, **shape, "stages": stages, "beam": beam}


def timed(ways: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of each way, medians of rounds in which each runs once; on a CPU as `medians`."""
    if device.type != "cuda":
        return medians(ways, repeats)
    runs = {name: _captured(run) for name, run in ways.items()}
    flushed = torch.empty(_FLUSHED, dtype=torch.uint8, device=device)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in runs.items():
            flushed.zero_()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times[name].append(start.elapsed_time(stop))
    return {name: statistics.median(each) for name, each in times.items()}


def _captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` as a CUDA graph; as it is if it asks the device something."""
    for _ in range(3):  # what is compiled or chosen in the first runs
        run()
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")  # a capture that fails would leave the random generators unusable
    try:
        run()
    except RuntimeError:
        return run
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _copy_speed(device: str) -> float:
    """Gigabytes a second, read and written, of a copy far larger than the caches."""
    source = torch.empty((1 << 30) if torch.device(device).type == "cuda" else 1 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / timed({"copy": lambda: target.copy_(source)}, 10, source.device)["copy"] / 1e6


def _product_speed(device: str, dtype: torch.dtype) -> float:
    """Operations a second (two a multiply-add) of a square matrix product; float32 in TF32."""
    side = 8192 if torch.device(device).type == "cuda" else 128
    first, second = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return 2 * side**3 / timed({"product": lambda: first @ second}, 10, first.device)["product"] * 1e3
    finally:
        torch.set_float32_matmul_precision(before)


def _name(device: str) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device
