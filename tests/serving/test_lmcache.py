"""LMCache's tiers in codes (`kvfold/serving/lmcache.py`); LMCache itself, where it is installed, in its own interface."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import SPEC, codec_set

from kvfold.codecs.artifact import CodecSet
from kvfold.errors import InputError
from kvfold.serving.lmcache import ChunkCoder, register

LAYERS, HEADS, DIM = sum(layer.coded for layer in SPEC.layers), SPEC.kv_heads, SPEC.head_dim
NEEDS_LMCACHE = pytest.mark.skipif(importlib.util.find_spec("lmcache") is None, reason="LMCache is not installed")


def coded(method: str, **changes: Any) -> CodecSet:
    """Of a model whose layers are all coded."""
    made = codec_set(method, **changes)
    spec = replace(SPEC, layers=tuple(layer for layer in SPEC.layers if layer.coded))
    keys, values = (tuple(codec for codec in side if codec is not None) for side in (made.keys, made.values))
    return CodecSet(method, made.settings, spec, keys, values, {"seed": 0, "tokens": 300, "distortion": [[0.1, 0.2]] * LAYERS})


def chunk(tokens: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(2, LAYERS, tokens, HEADS * DIM).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [1, 7, 256])
@pytest.mark.parametrize("method", ["turboquant", "rvq-paper"])
def test_a_chunk_comes_back_as_its_codes_say(method: str, tokens: int, dtype: torch.dtype) -> None:
    codecs = coded(method, rope="post") if method == "rvq-paper" else coded(method)
    coder, x = ChunkCoder(codecs), chunk(tokens, dtype)
    data = coder.encode(x)
    assert data.dtype == torch.uint8
    assert data.numel() == coder.bytes(x.shape)
    got = torch.full_like(x, torch.nan)
    coder.decode(torch.cat((data, torch.full((9,), 255, dtype=torch.uint8))), got)
    for side, set_of in enumerate((codecs.keys, codecs.values)):
        for layer, codec in enumerate(set_of):
            assert codec is not None
            rows = x[side, layer].float().view(1, tokens, HEADS, DIM).transpose(1, 2)
            want = codec.decode(codec.encode(rows))[0].transpose(0, 1).reshape(tokens, -1).to(dtype)
            assert torch.equal(got[side, layer], want)


def test_bytes_are_those_of_the_codes_and_a_head() -> None:
    codecs = coded("turboquant")
    bits = sum(codec.bits_per_element for codec in (*codecs.keys, *codecs.values) if codec is not None)
    rest = ChunkCoder(codecs).bytes(chunk(100).shape) - 32 - 100 * HEADS * DIM * bits / 8
    assert 0 <= rest <= 100 * LAYERS * HEADS * 3  # what aligns float16 fields


def test_foreign_bytes_are_refused_and_nothing_is_written() -> None:
    coder, other = ChunkCoder(coded("turboquant")), ChunkCoder(coded("turboquant", bits=3))
    x = chunk(8)
    for data in (other.encode(x), coder.encode(x)[:-1], torch.zeros(10_000, dtype=torch.uint8)):
        into = torch.full_like(x, 7)
        with pytest.raises(InputError, match="of this codec"):
            coder.decode(data, into)
        assert bool((into == 7).all())


def test_codecs_that_need_positions_or_blocks_and_other_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="attend to the whole past"):
        ChunkCoder(codec_set("turboquant"))
    with pytest.raises(InputError, match="a codec of keys after RoPE"):
        ChunkCoder(coded("rvq"))
    with pytest.raises(InputError, match="codes every token by itself"):
        ChunkCoder(coded("kivi"))
    with pytest.raises(InputError, match="of the model this codec was calibrated for"):
        ChunkCoder(coded("turboquant")).encode(torch.zeros(2, LAYERS + 1, 4, HEADS * DIM))


@pytest.mark.vllm  # is in that environment, and in no other
@NEEDS_LMCACHE
def test_lmcache_writes_and_reads_through_it(tmp_path: Path) -> None:
    from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
    from lmcache.v1.distributed.serde.base import SerdeConfig
    from lmcache.v1.distributed.serde.factory import create_serde_processor, get_registered_serde_types
    from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj

    def memory(shape: torch.Size, dtype: torch.dtype, kind: Any) -> TensorMemoryObj:
        raw = torch.zeros(shape.numel() * dtype.itemsize, dtype=torch.uint8)
        told = MemoryObjMetadata(shape=shape, dtype=dtype, address=0, phy_size=raw.numel(), ref_count=1, pin_count=0, fmt=kind)
        return TensorMemoryObj(raw, told, None)

    def ended(query: Callable[[int], bool | None], task: int) -> bool:
        deadline = time.monotonic() + 60
        while (said := query(task)) is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return said

    if "kvfold" not in get_registered_serde_types():
        register()
    coded("turboquant").save(tmp_path / "codec")
    serde = create_serde_processor(SerdeConfig("kvfold", {"codec": str(tmp_path / "codec")}))
    x = chunk(64)
    size = serde.estimate_serialized_size(MemoryLayoutDesc([x.shape], [x.dtype]))
    source, target = memory(x.shape, x.dtype, MemoryFormat.KV_2LTD), memory(x.shape, x.dtype, MemoryFormat.KV_2LTD)
    source.tensor.copy_(x)
    stored = memory(torch.Size([size]), torch.uint8, MemoryFormat.BINARY)
    keys = [ObjectKey(b"x", "model", 0)]
    task = serde.submit_serialize([source], [stored], keys)
    assert ended(serde.query_serialize_result, task)
    task = serde.submit_deserialize([stored], [target], keys)
    assert ended(serde.query_deserialize_result, task)
    want = torch.empty_like(x)
    coder = ChunkCoder(coded("turboquant"))
    coder.decode(coder.encode(x), want)
    assert torch.equal(target.tensor, want)
    stored.tensor.zero_()
    task = serde.submit_deserialize([stored], [target], keys)
    assert not ended(serde.query_deserialize_result, task)
    serde.close()
