"""A cache kept on disk as one safetensors file, and resumed in another process.

The header holds version, codec fingerprint, sinks, window, block, lengths and a SHA-256 over the tensors; codes go to disk
as they lie in memory.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvfold.cache.cache import CompressedCache
from kvfold.cache.layer import CodedLayer
from kvfold.codecs.artifact import CodecSet
from kvfold.codes import Codes
from kvfold.errors import InputError
from kvfold.files import replacing_file

_KIND, _VERSION = "kvfold cache", 3
_WHAT = "a cache file made by CompressedCache.save"
_SLIDING = ("keys", "values")


def save_cache(cache: CompressedCache, file: str | Path, input_ids: Tensor | None = None) -> None:
    """Write `cache` to `file` (a temporary name first). `input_ids [B, T]` are kept beside it.

    Raises:
        InputError: the cache is empty, or the folder does not exist.
    """
    if not cache.get_seq_length():
        raise InputError("a cache that holds tokens", "an empty one", "run the model on the prompt first")
    tensors: dict[str, Tensor] = {} if input_ids is None else {"input_ids": input_ids.to(torch.int64)}
    tensors |= {f"positions.{name}": tensor for name, tensor in cache.positions.state().items()}
    lengths: list[int] = []
    levels: list[list[int]] = []  # of the segments of every coded layer
    for index, layer in enumerate(cache.layers):
        lengths.append(layer.get_seq_length())
        if isinstance(layer, CodedLayer):
            parts = {f"exact.{name}": tensor for name, tensor in layer.exact.items()}
            for number, segment in enumerate(layer.past.segments):
                for side, codes in (("key", segment.keys.codes()), ("value", segment.values.codes())):
                    parts |= {f"{side}.{number}.{name}": tensor for name, tensor in (codes.fields if codes else {}).items()}
            levels.append([segment.level for segment in layer.past.segments])
        else:
            parts = {f"sliding.{name}": getattr(layer, name) for name in _SLIDING}
        tensors |= {f"{index}.{name}": tensor for name, tensor in parts.items()}
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {
        "kind": _KIND,
        "version": _VERSION,
        "codecs": cache.codecs.fingerprint(),
        "sinks": cache.sinks,
        "window": cache.window,
        "block": cache.block,
        "lengths": lengths,
        "levels": levels,
    }
    header["sha256"] = _checksum(header, tensors)
    with replacing_file(Path(file)) as fresh:
        save_file(tensors, fresh, metadata={"kvfold": json.dumps(header)})


def load_cache(file: str | Path, codecs: CodecSet, config: Any, max_bytes: int | None = None) -> CompressedCache:
    """The cache saved in `file`, on the codecs' device; its `input_ids` are the tokens saved beside it, or None.

    Raises:
        InputError: no such file, truncated, altered, or written with other codecs.
    """
    header, tensors = _read(Path(file))
    tensors = {name: tensor.to(codecs.device) for name, tensor in tensors.items()}
    if header["codecs"] != codecs.fingerprint():
        raise InputError("the codecs the cache was written with", f"others than {file} names", "load the same codec folder")
    try:
        cache = CompressedCache(
            codecs, config, max_bytes, sinks=header["sinks"], window=header["window"], block=header["block"]
        )
        levels = iter(header["levels"])
        cache.positions.restore(_part(tensors, "positions."))
        for index, (layer, length) in enumerate(zip(cache.layers, header["lengths"], strict=True)):
            parts = _part(tensors, f"{index}.")
            if isinstance(layer, CodedLayer):
                segments = [
                    (level, *(Codes(_part(parts, f"{side}.{number}.")) for side in ("key", "value")))
                    for number, level in enumerate(next(levels))
                ]
                layer.load(length, _part(parts, "exact."), segments)
            else:
                layer.lazy_initialization(parts["sliding.keys"], parts["sliding.values"])
                layer.keys, layer.values = (parts[f"sliding.{name}"] for name in _SLIDING)
                layer.cumulative_length = length
    except (KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(_WHAT, f"{file}, whose parts do not fit together ({error!r})", "save the cache again") from None
    cache.input_ids = tensors.get("input_ids")
    return cache


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not file.is_file():
        raise InputError(_WHAT, f"nothing at {file}", "check the path")
    try:
        with safe_open(file, framework="pt") as opened:
            header = json.loads((opened.metadata() or {}).get("kvfold", "{}"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(_WHAT, f"{file}, which is damaged or cut short ({error})", "save the cache again") from None
    if header.get("kind") != _KIND or header.get("version") != _VERSION:
        came = f"{file}, of kind {header.get('kind')!r} and version {header.get('version')!r}"
        raise InputError(_WHAT, came, "save the cache again with this kvfold")
    if header.pop("sha256", None) != _checksum(header, tensors):
        raise InputError(_WHAT, f"{file}, altered since it was written", "save the cache again")
    return header, tensors


def _checksum(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        total.update(name.encode() + str(tuple(tensors[name].shape)).encode())
        total.update(tensors[name].view(torch.uint8).numpy().tobytes() if tensors[name].numel() else b"")
    return total.hexdigest()


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
