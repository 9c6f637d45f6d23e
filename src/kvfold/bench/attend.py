"""One layer's decode attention on codes beside PyTorch's on the uncompressed bfloat16 cache.

Codes are random, codewords of stage `s` are normal with a standard deviation of `0.8^s`, so a decoded vector looks like one
of a real codec; the dense cache holds the decoded vectors, so that both ways compute the same thing. Softmax over such keys
is flat: nothing can be skipped, which is the worst case. Both caches are read again and again, so what fits the processor's
last-level cache is read from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfold import ops
from kvfold.bench.timing import medians
from kvfold.errors import InputError
from kvfold.ops import native
from kvfold.ops.attend.naive import decode_tile
from kvfold.packing import pack
from kvfold.progress import Progress

CONTEXTS = (4096, 32768)
ROPES = ("post", "pre")
_KNOWN = (*ROPES, "center")  # after RoPE around a center that is rotated


def bench_attend(
    contexts: Sequence[int] = CONTEXTS,
    ropes: Sequence[str] = ROPES,
    *,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    stages: int = 8,
    codebook_size: int = 256,
    group: int = 32,
    repeats: int = 15,
    seed: int = 0,
    backend: str | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Measure a decode step (one query, batch 1) of one layer at every context, keys coded after RoPE or before it.

    Args:
        ropes: "post", "pre", or "center" for keys after RoPE around a rotated center.
        repeats: rounds in which every way is run once; medians are reported.
        backend: of `ops.attend`; None for the best there is.

    Returns:
        One object a context and `rope`: `kvfold_ms`; `sdpa_bf16_ms` (`scaled_dot_product_attention`, the faster of
        `enable_gqa` and grouped queries), `matmul_bf16_ms` (matmul, softmax, matmul), `dense_bf16_ms` (the faster of the
        two); `read_bf16_ms` and `read_codes_ms`, reading either cache once; `max_rel_error` against the naive op, root
        mean squares, the worst head; `threads`, `isa`.

    Raises:
        InputError: sizes that do not fit together, or no native ops to read memory with.
    """
    check_sizes(heads, kv_heads, head_dim, group, ropes)
    reader = native.module()
    results = []
    with Progress("bench attend", len(contexts) * len(ropes), quiet) as step, torch.no_grad():
        for context in contexts:
            for rope in ropes:
                torch.manual_seed(seed)
                key, value = (
                    random_codes(kv_heads, context, head_dim, stages, codebook_size, group, strided)
                    for strided in (True, False)
                )
                rotation = None if rope == "post" else random_rotation(context, head_dim)
                if rope == "center":
                    key = key._replace(center=torch.randn(kv_heads, head_dim))
                query = torch.randn(1, heads, 1, head_dim)
                result = _measure(query, key, value, rotation, repeats, backend, reader)
                sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "stages": stages}
                sizes |= {"codebook_size": codebook_size, "group": group}
                results.append({"context": context, "rope": rope, **result, **sizes})
                step()
    return results


def check_sizes(heads: int, kv_heads: int, head_dim: int, group: int, ropes: Sequence[str]) -> None:
    """InputError for sizes that do not fit together, or an unknown `rope`."""
    if heads % kv_heads or head_dim % group:
        raise InputError("heads a multiple of kv-heads, head-dim of group", f"{heads}/{kv_heads}, {head_dim}/{group}", "change")
    unknown = [rope for rope in ropes if rope not in _KNOWN]
    if unknown:
        raise InputError("rope pre, post or center", repr(unknown[0]), "choose among these")


def _measure(
    query: Tensor,
    key: ops.Coded,
    value: ops.Coded,
    rotation: ops.Rotation | None,
    repeats: int,
    backend: str | None,
    reader: Any,
) -> dict[str, Any]:
    scale = query.shape[-1] ** -0.5
    kv_heads = key.packed.shape[1]
    arguments = (query, key, value, rotation, None, scale)
    right, right_lse = ops.attend(*arguments, backend="naive")
    out, lse = ops.attend(*arguments, backend=backend)
    keys, values = dense_cache(key, value, rotation)
    dense_query = query.bfloat16()
    grouped = dense_query.view(1, kv_heads, -1, query.shape[-1])
    codes = [key.packed, value.packed]
    threads = torch.get_num_threads()

    def matmul() -> Tensor:
        scores = torch.matmul(grouped, keys.transpose(-1, -2)) * scale
        return torch.matmul(torch.softmax(scores, -1, dtype=torch.float32).bfloat16(), values)

    def read(tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            reader.read(native.array(tensor.view(torch.uint8).flatten()), threads)

    times = medians(
        {
            "kvfold_ms": lambda: ops.attend(*arguments, backend=backend),
            "gqa": lambda: F.scaled_dot_product_attention(dense_query, keys, values, scale=scale, enable_gqa=True),
            "grouped": lambda: F.scaled_dot_product_attention(grouped, keys, values, scale=scale),
            "matmul_bf16_ms": matmul,
            "read_bf16_ms": lambda: read((keys, values)),
            "read_codes_ms": lambda: read(codes),
        },
        repeats,
    )
    sdpa = min(times.pop("gqa"), times.pop("grouped"))
    dense = min(sdpa, times["matmul_bf16_ms"])
    return {
        **times,
        "sdpa_bf16_ms": sdpa,
        "dense_bf16_ms": dense,
        "speedup": dense / times["kvfold_ms"],
        "max_rel_error": worst_error(out, right),
        "max_lse_error": float((lse - right_lse).abs().max()),
        "threads": threads,
        "isa": native.isa(),
    }


def dense_cache(key: ops.Coded, value: ops.Coded, rotation: ops.Rotation | None) -> tuple[Tensor, Tensor]:
    """The keys, rotated, and values that the codes stand for, bfloat16 `[B, G, T, D]`."""
    tokens = key.packed.shape[2]
    keys = decode_tile(key, 0, tokens)
    if rotation is not None:
        keys = ops.rotate(keys, *rotation) if key.center is None else keys + ops.rotated_center(key.center, rotation)
    return keys.bfloat16(), decode_tile(value, 0, tokens).bfloat16()


def worst_error(out: Tensor, right: Tensor) -> float:
    """Of `[..., D]`: root mean square of the error over that of what is right, the worst head."""
    return float(((out - right).square().mean(-1) / right.square().mean(-1)).sqrt().max())


def random_codes(
    kv_heads: int, tokens: int, head_dim: int, stages: int, size: int, group: int, strided: bool, batch: int = 1
) -> ops.Coded:
    """Codes of `batch` rows of `tokens` tokens on the default device, codebooks shared by all heads."""
    groups = head_dim // group
    deviation = 0.8 ** torch.arange(stages)
    deviation = deviation / deviation.norm()
    codebooks = (torch.randn(stages, size, group) * deviation[:, None, None]).half()
    book = torch.arange(stages).view(-1, 1, 1).expand(-1, kv_heads, groups).contiguous()
    bits = (size - 1).bit_length()
    packed = pack(torch.randint(size, (batch, kv_heads, tokens, stages * groups), dtype=torch.int32), bits)
    scale = (torch.rand(batch, kv_heads, tokens, 1) * 0.4 + 0.8).half()
    order = torch.arange(head_dim)
    channels = order.view(group, groups).T.contiguous() if strided else order.view(groups, group)
    return ops.Coded(packed, scale, codebooks, book, channels, bits)


def random_rotation(tokens: int, head_dim: int) -> ops.Rotation:
    """RoPE of base 500,000 (Llama 3) at positions 0, 1, 2, ..."""
    half = head_dim // 2
    return ops.Rotation(torch.arange(tokens, dtype=torch.int32)[None], 5e5 ** -(torch.arange(half) / half), 1.0, False)
