"""`kvfold inspect` and `kvfold codecs`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kvfold.bench.plot import plot_distortion
from kvfold.codecs import METHODS, build_codec, resolve_settings
from kvfold.codecs.artifact import PLOT, CodecSet, load
from kvfold.commands.common import (
    check_json,
    emit,
    picture,
    table,
)
from kvfold.files import require_file_target


def inspect(args: argparse.Namespace) -> None:
    """`kvfold inspect`: header, a row a layer, and a picture of the distortion."""
    codecs = load(args.codec)
    check_json(args)
    plot = Path(args.plot or Path(args.codec, PLOT))
    require_file_target(plot)
    layers = _layers(codecs)
    spec, info = codecs.spec, codecs.info
    facts = {
        "method": codecs.method,
        "settings": codecs.settings,
        "model": {
            "type": spec.model_type,
            "layers": len(spec.layers),
            "heads": spec.heads,
            "kv_heads": spec.kv_heads,
            "head_dim": spec.head_dim,
            "max_positions": spec.max_positions,
            "fingerprint": spec.fingerprint(),
        },
        **{name: info.get(name) for name in ("seed", "tokens", "samples", "text", "ema")},
        "bits_per_element": codecs.bits_per_element,
        "bytes_codebooks": codecs.codebook_bytes,
        "bytes_folder": sum(file.stat().st_size for file in Path(args.codec).glob("codecs.*")),
        "layers": layers,
    }
    ema = info.get("ema")
    learned = f", then {ema['steps']} steps of moving average over {ema['tokens']} tokens" if ema else ""
    settings = " ".join(f"{name}={value}" for name, value in codecs.settings.items())
    rows = [["layer", "key bits", "value bits", "key distortion", "value distortion"]]
    for layer in layers:
        numbers = [layer[name] for name in ("key_bits", "value_bits", "key_distortion", "value_distortion")]
        rows.append([str(layer["layer"]), *("exact" if x is None else f"{x:.4g}" for x in numbers)])
    lines = [
        f"method     {codecs.method}: {settings}",
        f"model      {spec.model_type}, {len(spec.layers)} layers, {spec.heads} query heads, {spec.kv_heads} KV heads, "
        f"head dim {spec.head_dim}",
        f"made from  {info.get('tokens')} tokens ({info.get('text')} text), {info.get('samples')} sampled, "
        f"seed {info.get('seed')}{learned}",
        "",
        table(rows),
        "",
        f"{codecs.bits_per_element:.3f} bits per element, {codecs.codebook_bytes:,} bytes of codebooks, "
        f"{facts['bytes_folder']:,} bytes on disk",
    ]
    emit(args, facts, "\n".join(lines))
    coded = [layer for layer in layers if layer["key_distortion"] is not None]
    keys, values = ([layer[f"{side}_distortion"] for layer in coded] for side in ("key", "value"))
    indices, title = [layer["layer"] for layer in coded], f"{codecs.method} on {spec.model_type}"
    picture(lambda: plot_distortion(indices, keys, values, title, plot), plot)


def _layers(codecs: CodecSet) -> list[dict[str, Any]]:
    """Bits and distortion of every layer; None in a layer that stays exact."""
    distortion = codecs.info.get("distortion") or [None] * len(codecs.keys)
    rows = []
    for index, (key, value, errors) in enumerate(zip(codecs.keys, codecs.values, distortion, strict=True)):
        bits = [None if codec is None else codec.bits_per_element for codec in (key, value)]
        named = zip(
            ("key_bits", "value_bits", "key_distortion", "value_distortion"), (*bits, *(errors or (None, None))), strict=True
        )
        rows.append({"layer": index, **dict(named)})
    return rows


def codecs(args: argparse.Namespace) -> None:
    """`kvfold codecs`: a line a method."""
    rows = [["codec", "bits (D=64)", "bits (D=128)", "what", "source"]]
    for name, row in METHODS.items():
        bits = [f"{_bits(name, head_dim):.3f}" for head_dim in (64, 128)]
        rows.append([name, *bits, row.summary, row.source])
    print(table(rows, left=(0, 3, 4)))


def _bits(name: str, head_dim: int) -> float:
    settings = resolve_settings(name, {}, head_dim)
    sides = [build_codec(name, side, head_dim, settings).bits_per_element for side in ("key", "value")]
    return sum(sides) / 2
