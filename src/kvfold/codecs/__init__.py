"""The methods, by name: what `--codec NAME` means, its settings, its codecs for one layer.

Adding a method is one file beside this one, its codec class in `KINDS` and its row in `METHODS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from kvfold.codecs.aqlm import AqlmCodec
from kvfold.codecs.asymkv import build_asymkv
from kvfold.codecs.base import Codec, Side
from kvfold.codecs.decoquant import DecoQuantCodec
from kvfold.codecs.identity import IdentityCodec
from kvfold.codecs.kashin import KashinCodec
from kvfold.codecs.kivi import KiviCodec
from kvfold.codecs.kvquant import KVQuantCodec
from kvfold.codecs.lattice import LatticeCodec
from kvfold.codecs.lorc import LorcCodec, rank_of, settle_lorc
from kvfold.codecs.opq import OpqCodec, build_opq, settle_opq
from kvfold.codecs.qjl import PROJECTIONS, QjlCodec
from kvfold.codecs.residual import ResidualCodec, ResidualSettings
from kvfold.codecs.turboquant import TurboQuantCodec
from kvfold.codecs.turboquant_prod import TurboQuantProdCodec
from kvfold.codecs.wkvquant import WkvQuantCodec
from kvfold.errors import InputError
from kvfold.packing import packed_bytes

_CODECS: tuple[type[Codec], ...] = (
    AqlmCodec,
    DecoQuantCodec,
    IdentityCodec,
    KashinCodec,
    KiviCodec,
    KVQuantCodec,
    LatticeCodec,
    LorcCodec,
    OpqCodec,
    QjlCodec,
    ResidualCodec,
    TurboQuantCodec,
    TurboQuantProdCodec,
    WkvQuantCodec,
)
KINDS: dict[str, type[Codec]] = {codec.kind: codec for codec in _CODECS}

Codecs = Sequence[Codec | None]  # of one side, a codec a layer


@dataclass(frozen=True)
class Method:
    """A row of `kvfold codecs`.

    Attributes:
        summary: one line.
        source: paper or "kvfold".
        defaults: settings by name; `--set name=value` replaces one.
        build: `(side, head_dim, settings, layer) -> Codec`, unfitted.
        compared: settings that `kvfold compare` measures by itself, a row each, as after the colon of `--codecs`; "" is the
            defaults.
        settle: `(keys, values, settings) -> (keys, values)`, fitted codecs of all layers (None for one that stays exact), when
            layers share what was learned of them all; None if every codec stands alone.
    """

    summary: str
    source: str
    defaults: dict[str, Any]
    build: Callable[[Side, int, dict[str, Any], int], Codec]
    compared: tuple[str, ...] = ("",)
    settle: Callable[[Codecs, Codecs, dict[str, Any]], tuple[Codecs, Codecs]] | None = None


def _residual(kind: type[ResidualCodec]) -> Callable[[Side, int, dict[str, Any], int], Codec]:
    """Of a method that has residual VQ's settings."""

    def build(side: Side, head_dim: int, settings: dict[str, Any], layer: int) -> Codec:
        own = {field.name: settings[field.name] for field in fields(kind.settings_type) if field.name in settings}
        if side == "value":
            own["stages"] += settings["extra_value_stages"]
        pre_rope = side == "key" and settings["rope"] == "pre"
        own |= {"grouping": settings[f"{side}_groups"], "pre_rope": pre_rope}
        own["center"] = bool(settings["center"]) and side == "key" and not pre_rope
        return kind(head_dim, kind.settings_type(**own))

    return build


def _same_for_all(kind: type[Codec]) -> Callable[[Side, int, dict[str, Any], int], Codec]:
    """Of a method whose codecs take its settings as they are, on either side and in every layer."""
    return lambda side, head_dim, settings, layer: kind.restore(head_dim, settings, {})


def _build_kivi(side: Side, head_dim: int, settings: dict[str, Any], layer: int) -> Codec:
    return KiviCodec(head_dim, "channel" if side == "key" else "token", settings["bits"], settings["group"])


def _build_qjl(side: Side, head_dim: int, settings: dict[str, Any], layer: int) -> Codec:
    if side == "value":
        return KiviCodec(head_dim, "token", settings["value_bits"], settings["group"])
    first = "first_" if layer < settings["first_layers"] else ""
    own = {name: settings[name] for name in ("outliers", "group", "projection", "seed")}
    return QjlCodec(head_dim, settings[f"{first}sketch"], outlier_sketch=settings[f"{first}outlier_sketch"], **own)


def _build_turboquant_prod(side: Side, head_dim: int, settings: dict[str, Any], layer: int) -> Codec:
    return TurboQuantProdCodec(head_dim, **settings) if side == "key" else TurboQuantCodec(head_dim, settings["bits"])


def _build_lattice(side: Side, head_dim: int, settings: dict[str, Any], layer: int) -> Codec:
    own = {name: value for name, value in settings.items() if name != "rope"}
    return LatticeCodec(head_dim, **own, pre_rope=side == "key" and settings["rope"] == "pre")


def _build_lorc(side: Side, head_dim: int, settings: dict[str, Any], layer: int) -> Codec:
    if not 0 < settings["least"] <= settings["rank"] <= 1:
        told = f"least {settings['least']:g}, rank {settings['rank']:g}"
        raise InputError("shares of the head dim, 0 < least <= rank <= 1", told, "correct them")
    own = {name: settings[name] for name in ("bits", "latent", "basis_of")}
    return LorcCodec(head_dim, rank_of(settings["rank"], head_dim), **own, pre_rope=side == "key")


def _build_wkvquant(side: Side, head_dim: int, settings: dict[str, Any], layer: int) -> Codec:
    return WkvQuantCodec(head_dim, settings["bits"], min(settings["group"], head_dim), pre_rope=side == "key")


_PAPER: dict[str, Any] = {
    "group": 32,
    "codebook_size": 2048,
    "stages": 8,
    "extra_value_stages": 0,
    "beam": 1,
    "rope": "pre",
    "key_groups": "strided",
    "value_groups": "contiguous",
    "sharing": "layer",
    "codebook_dtype": "float16",
    "scale_bits": 16,
    "center": 0,
    "weight_power": 0.0,
    "distill_steps": 0,
    "iterations": 10,
    "max_vectors": 65536,
}
_RVQ: dict[str, Any] = {
    **_PAPER,
    "codebook_size": 256,
    "extra_value_stages": 1,
    "beam": 4,
    "sharing": "head",
    "codebook_dtype": "float8",
    "scale_bits": 8,
    "center": 1,
    "weight_power": 0.5,
    "distill_steps": 120,
}
_AQLM: dict[str, Any] = {
    **_PAPER,
    "group": 8,
    "codebook_size": 256,
    "stages": 2,
    "beam": 8,
    "sharing": "head",
    "weight_power": 1.0,
    "rounds": 6,
    "max_vectors": 131072,
}
_SOURCE = "Kumar 2024, arXiv 2410.15704"

METHODS: dict[str, Method] = {
    "rvq": Method(
        "residual VQ, own books per head, weighted search, trained by KL",
        f"kvfold; {_SOURCE}",
        _RVQ,
        _residual(ResidualCodec),
        compared=("bits=1.25", "bits=1.75", "bits=2.25", "bits=3", "bits=4"),
    ),
    "rvq-post": Method(
        "rvq of keys after RoPE around a rotated center, for faster attention",
        f"kvfold; {_SOURCE}",
        {**_RVQ, "rope": "post", "beam": 8, "stages": 9, "extra_value_stages": -1, "distill_steps": 200},
        _residual(ResidualCodec),
    ),
    "rvq-paper": Method("residual VQ, 8 stages of 2048 codewords, greedy", _SOURCE, _PAPER, _residual(ResidualCodec)),
    "turboquant": Method(
        "random rotation, Lloyd-Max levels",
        "Zandieh et al. 2025, arXiv 2504.19874",
        {"bits": 2, "outliers": 0, "outlier_bits": 3},
        _same_for_all(TurboQuantCodec),
        compared=("bits=2", "outliers=16", "bits=3", "bits=4"),
    ),
    "kivi": Method(
        "integers between minimum and maximum, keys per channel, values per token",
        "Liu et al. 2024, arXiv 2402.02750",
        {"bits": 2, "group": 32},
        _build_kivi,
        compared=("bits=2", "bits=4"),
    ),
    "kvquant": Method(
        "levels by sensitivity, keys per channel, values per token, 1% outliers",
        "Hooper et al. 2024, arXiv 2401.18079",
        {"bits": 3, "outliers": 0.01, "qnorm": 2},
        lambda side, head_dim, settings, layer: KVQuantCodec(head_dim, side, **settings),
        compared=("bits=2", "bits=3", "bits=4"),
    ),
    "asymkv": Method(
        "kivi with fewer bits for values and for later layers",
        "Tao et al. 2024, arXiv 2410.13212",
        {"key_layers": 16, "value_layers": 0, "high": 2, "low": 1, "group": 32, "budget": 0.0},
        build_asymkv,
        compared=("key_layers=30:value_layers=0", "key_layers=15:value_layers=15:high=4:low=2"),
    ),
    "opq": Method(
        "uniform levels with a pruning threshold, widths of layers by one budget",
        "Hu et al. 2021, arXiv 2205.11141",
        {"bits": 3.0, "weight": "sensitivity"},
        build_opq,
        compared=("bits=2", "bits=3", "bits=4"),
        settle=settle_opq,
    ),
    "turboquant-prod": Method(
        "turboquant with a bit less, and the signs of a projection of what it leaves of keys",
        "Zandieh et al. 2025, arXiv 2504.19874",
        {"bits": 3, "seed": 0},
        _build_turboquant_prod,
        compared=("bits=3", "bits=4"),
    ),
    "qjl": Method(
        "keys as signs of random projections, outlier channels apart; values as kivi",
        "Zandieh et al. 2024, arXiv 2406.03482",
        {
            "sketch": 2,
            "outlier_sketch": 2,
            "first_layers": 15,
            "first_sketch": 4,
            "first_outlier_sketch": 1,
            "outliers": 8,
            "group": 32,
            "value_bits": 2,
            "projection": "orthogonal",
            "seed": 0,
        },
        _build_qjl,
        compared=("first_layers=0", ""),
    ),
    "kashin": Method(
        "sum of two flat vectors in two bases, few levels each",
        "Merkulov et al. 2024, arXiv 2404.09737",
        {"bits": 2, "steps": 8, "refine": 4},
        _same_for_all(KashinCodec),
        compared=("bits=1", "bits=2"),
    ),
    "lattice": Method(
        "principal axes or rotation, lattice E8, bits shared out among blocks of 8",
        "Lei et al. 2024, arXiv 2403.07320; Savkin et al. 2025, arXiv 2502.09720",
        {"bits": 2.0, "scales": 4, "transform": "pca", "rope": "pre", "scale_bits": 8},
        _build_lattice,
        compared=("bits=1.25", "bits=2", "bits=3", "bits=4"),
    ),
    "decoquant": Method(
        "chunks split into a large factor in integers and a small exact one",
        "Liu et al. 2024, arXiv 2405.12591",
        {"bits": 4, "inner": 8, "block": 128},
        _same_for_all(DecoQuantCodec),
    ),
    "aqlm": Method(
        "additive codebooks, beam search and joint least squares under the model's own error",
        "Egiazarian et al. 2024, arXiv 2401.06118",
        _AQLM,
        _residual(AqlmCodec),
    ),
    "lorc": Method(
        "weights of keys and values at a low rank, the latent is cached, ranks by condition numbers",
        "Zhang et al. 2024, arXiv 2410.03111",
        {"rank": 0.5, "least": 0.25, "bits": 16, "latent": "joint", "basis_of": "weights"},
        _build_lorc,
        compared=("rank=0.5:bits=8", "rank=0.5:bits=4", "rank=0.75:bits=4"),
        settle=settle_lorc,
    ),
    "wkvquant": Method(
        "learned shift and scale a channel, then integers between minimum and maximum of a token",
        "Yue et al. 2024, arXiv 2402.12065",
        {"bits": 4, "group": 128, "train_steps": 16},
        _build_wkvquant,
    ),
    "identity": Method(
        "no compression, the cache's own yardstick",
        "kvfold",
        {"dtype": "float32"},
        _same_for_all(IdentityCodec),
        compared=(),
    ),
}

_CHOICES = {
    "rope": ("pre", "post"),
    "key_groups": ("strided", "contiguous"),
    "value_groups": ("strided", "contiguous"),
    "sharing": ("layer", "head"),
    "codebook_dtype": ("float16", "float8"),
    "scale_bits": (8, 16),
    "center": (0, 1),
    "projection": PROJECTIONS,
    "latent": ("joint", "own"),
    "basis_of": ("weights", "samples"),
}


_AT_LEAST_0 = ("distill_steps", "train_steps", "first_layers", "seed")


def method(name: str) -> Method:
    """The method called `name`; InputError naming the others if there is none."""
    if name not in METHODS:
        raise InputError(f"a codec among {', '.join(METHODS)}", repr(name), "see `kvfold codecs`")
    return METHODS[name]


def resolve_settings(name: str, changes: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Defaults of method `name` with `changes` (values may be strings) applied.

    `bits=X` stands for the stages that come to at most `X` bits per element at this head dim, keys and values together; if
    their number is odd, the side with more by default gets the one more (values where `extra_value_stages` is above 0, keys
    below; at 0 both have the same).

    Raises:
        InputError: unknown setting, or a value of the wrong type or outside its choices.
    """
    defaults = method(name).defaults
    changes = dict(changes)
    bits = changes.pop("bits", None) if "stages" in defaults else None
    settings = dict(defaults)
    for key, value in changes.items():
        if key not in defaults:
            known = ", ".join([*defaults, *(["bits"] if "stages" in defaults else [])])
            raise InputError(f"a setting of {name} among {known}", repr(key), "correct its name")
        settings[key] = _convert(key, value, type(defaults[key]))
    if bits is not None:
        settings.update(_stages_for(_convert("bits", bits, float), settings, head_dim))
    return settings


def build_codec(name: str, side: Side, head_dim: int, settings: dict[str, Any], layer: int = 0) -> Codec:
    """An unfitted codec of method `name` for one side of layer `layer`; `settings` as `resolve_settings` returns them."""
    return method(name).build(side, head_dim, settings, layer)


def settle(name: str, keys: Codecs, values: Codecs, settings: dict[str, Any]) -> tuple[Codecs, Codecs]:
    """The codecs of all layers, each fitted, as method `name` leaves them."""
    final = method(name).settle
    return (keys, values) if final is None else final(keys, values, settings)


def _convert(key: str, value: Any, to: type) -> Any:
    try:
        converted = to(value)
        if to in (int, float) and (not math.isfinite(converted) or converted != float(value)):
            raise ValueError(value)
    except (TypeError, ValueError, OverflowError):
        kind = {int: "a whole number", float: "a number"}.get(to, "text")
        raise InputError(f"{kind} for {key}", repr(value), "correct the value") from None
    if key in _CHOICES and converted not in _CHOICES[key]:
        known = ", ".join(map(str, _CHOICES[key]))
        raise InputError(f"{key} among {known}", repr(value), "choose one of these")
    if key in _AT_LEAST_0 and converted < 0:
        raise InputError(f"{key} of at least 0", repr(value), "raise it")
    return converted


def _stages_for(bits: float, settings: dict[str, Any], head_dim: int) -> dict[str, int]:
    one = ResidualCodec(
        head_dim, ResidualSettings(**{name: settings[name] for name in ("group", "codebook_size", "scale_bits")}, stages=1)
    )

    def bytes_of(stages: int) -> int:
        return packed_bytes(stages * one.groups, one.bits) + settings["scale_bits"] // 8

    both = int((2 * bits * head_dim - 2 * settings["scale_bits"]) / (one.bits * one.groups) + 1e-9)
    if not settings["extra_value_stages"]:
        both -= both % 2
    while both >= 2 and 8 * (bytes_of(both // 2) + bytes_of(both - both // 2)) > 2 * bits * head_dim + 1e-9:
        both -= 1 if settings["extra_value_stages"] else 2
    if both < 2:
        fix = "raise bits, or set a larger group or smaller codebook_size"
        raise InputError(f"bits of at least {one.bits_per_element:g}", f"{bits:g}", fix)
    extra = both % 2 if settings["extra_value_stages"] > 0 else -(both % 2)
    return {"stages": (both - extra) // 2, "extra_value_stages": extra}


__all__ = ["KINDS", "METHODS", "Codec", "Method", "Side", "build_codec", "method", "resolve_settings", "settle"]
