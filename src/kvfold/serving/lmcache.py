"""LMCache's tiers in codes: a serde, LMCache's name for what turns a chunk of keys and values into bytes and back (0.5.6).

An L2 adapter asks for it by `"serde": {"type": "kvfold", "codec": DIR}`. LMCache has no entry point for serdes, so one starts
its server through here, `python -m kvfold.serving.lmcache ARGUMENTS OF lmcache`, or calls `register` first.

A chunk is `[2, layers, T, G D]`, keys as the engine keeps them, rotated; where its tokens stand is not said. So a codec is
needed that codes rotated keys without their positions: `turboquant`, or `rvq --set rope=post --set center=0`. Bytes are a head,
by which bytes of another codec are told, and pages of one layer after another (`serving/paged.py`).
"""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import torch
from torch import Tensor

from kvfold.codecs.artifact import CodecSet, load
from kvfold.codecs.base import Codec
from kvfold.errors import InputError
from kvfold.serving.paged import PageLayout

_HEAD = 32  # bytes


class ChunkCoder:
    """Chunks of keys and values to bytes and back; LMCache's interface around it is `register`'s.

    Raises:
        InputError: a codec that needs positions, or codes several tokens together.
    """

    def __init__(self, codecs: CodecSet) -> None:
        self.heads = codecs.spec.kv_heads
        self.dim = codecs.spec.head_dim
        self._pairs: list[tuple[Codec, Codec]] = []
        for key, value in zip(codecs.keys, codecs.values, strict=True):
            if key is None or value is None:
                raise InputError(
                    "a model whose layers all attend to the whole past", "sliding windows", "use LMCache without kvfold"
                )
            if key.reads_positions:
                came = f"{key.kind}, which codes keys before RoPE or around a rotated center"
                raise InputError("a codec of keys after RoPE", came, "calibrate turboquant, or rvq with rope=post and center=0")
            self._pairs.append((key, value))
        self._layouts = [PageLayout(key, value, self.heads) for key, value in self._pairs]
        self._head = torch.tensor(list(hashlib.sha256(f"kvfold 1 {codecs.fingerprint()}".encode()).digest()), dtype=torch.uint8)

    def bytes(self, shape: torch.Size) -> int:
        """What a chunk `[2, layers, T, G D]` takes, exactly."""
        self._require(shape)
        return _HEAD + sum(layout.bytes for layout in self._layouts) * self.heads * shape[2]

    def encode(self, chunk: Tensor) -> Tensor:
        """uint8 `[bytes]`, on the CPU, of a floating-point chunk."""
        self._require(chunk.shape)
        tokens = chunk.shape[2]
        slots = torch.arange(tokens)
        parts = [self._head]
        for layer, ((key, value), layout) in enumerate(zip(self._pairs, self._layouts, strict=True)):
            keys, values = (chunk[side, layer].float().cpu().view(1, tokens, self.heads, self.dim) for side in (0, 1))
            pages = torch.zeros(1, self.heads, tokens, layout.bytes, dtype=torch.uint8)
            layout.write(pages, slots, key.encode(keys.transpose(1, 2)), value.encode(values.transpose(1, 2)))
            parts.append(pages.flatten())
        return torch.cat(parts)

    def decode(self, data: Tensor, into: Tensor) -> None:
        """Put the chunk that uint8 `data` (which may be longer) stands for into `into [2, layers, T, G D]`.

        Raises:
            InputError: bytes of another codec, or too few; `into` is left alone.
        """
        size, tokens = self.bytes(into.shape), into.shape[2]
        if data.numel() < size or not torch.equal(data[:_HEAD].cpu(), self._head):
            raise InputError(
                f"{size} bytes of this codec", f"{data.numel()} bytes of something else", "empty this tier of LMCache"
            )
        at, table = _HEAD, torch.zeros(1, 1, dtype=torch.int64)
        for layer, ((key, value), layout) in enumerate(zip(self._pairs, self._layouts, strict=True)):
            end = at + layout.bytes * self.heads * tokens
            pages = data[at:end].cpu().view(1, self.heads, tokens, layout.bytes)
            for side, (codec, codes) in enumerate(zip((key, value), layout.read(pages, table, [tokens]), strict=True)):
                vectors = codec.decode(codes)[0].transpose(0, 1).reshape(tokens, -1)
                into[side, layer].copy_(vectors.to(into.dtype))
            at = end

    def _require(self, shape: torch.Size) -> None:
        due = (2, len(self._pairs), self.heads * self.dim)
        if len(shape) != 4 or (shape[0], shape[1], shape[3]) != due:
            expected = f"chunks [2, {due[1]}, T, {due[2]}] of the model this codec was calibrated for"
            raise InputError(expected, str(list(shape)), "serve that model, without tensor parallelism")


def register() -> None:
    """Make LMCache know the serde `kvfold`; its setting `codec` is a folder, `max_workers` a number of threads (1)."""
    from lmcache.v1.distributed.serde.async_processor import AsyncSerdeProcessor
    from lmcache.v1.distributed.serde.base import Deserializer, Serializer
    from lmcache.v1.distributed.serde.factory import register_serde_factory

    class Writer(Serializer):
        """Keys and values to bytes."""

        def __init__(self, coder: ChunkCoder) -> None:
            self._coder = coder

        def serialize(self, src: Any, dst: Any, key: Any) -> int:
            data = self._coder.encode(src.tensor)
            _flat(dst)[: data.numel()].copy_(data)
            return data.numel()

        def estimate_serialized_size(self, layout_desc: Any) -> int:
            return sum(self._coder.bytes(torch.Size(shape)) for shape in layout_desc.shapes)

    class Reader(Deserializer):
        """Bytes to keys and values."""

        def __init__(self, coder: ChunkCoder) -> None:
            self._coder = coder

        def deserialize(self, src: Any, dst: Any, key: Any) -> None:
            self._coder.decode(_flat(src), dst.tensor)

    def make(told: dict[str, Any]) -> Any:
        if "codec" not in told or set(told) - {"codec", "max_workers"}:
            raise InputError('"serde": {"type": "kvfold", "codec": DIR}', repr(told), "correct it")
        coder = ChunkCoder(load(str(told["codec"])))
        return AsyncSerdeProcessor(Writer(coder), Reader(coder), max_workers=int(told.get("max_workers", 1)))

    register_serde_factory("kvfold", make)


def _flat(memory: Any) -> Tensor:
    """The bytes of one of LMCache's memory objects."""
    return memory.tensor.view(torch.uint8).flatten()


def main() -> None:
    """LMCache's command line, the serde known to it."""
    from lmcache.cli.main import main as lmcache

    register()
    lmcache(sys.argv[1:])


if __name__ == "__main__":
    main()
