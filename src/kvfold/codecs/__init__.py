"""The methods, by name: what `--codec NAME` means, its settings, its codecs for one layer.

Adding a method is one file beside this one, its codec class in `KINDS` and its row in `METHODS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvfold.codecs.base import Codec, Side
from kvfold.codecs.identity import IdentityCodec
from kvfold.codecs.residual import ResidualCodec, ResidualSettings
from kvfold.errors import InputError

KINDS: dict[str, type[Codec]] = {IdentityCodec.kind: IdentityCodec, ResidualCodec.kind: ResidualCodec}


@dataclass(frozen=True)
class Method:
    """A row of `kvfold codecs`.

    Attributes:
        summary: one line.
        source: paper or "kvfold".
        defaults: settings by name; `--set name=value` replaces one.
        build: `(side, head_dim, settings) -> Codec`, unfitted.
    """

    summary: str
    source: str
    defaults: dict[str, Any]
    build: Callable[[Side, int, dict[str, Any]], Codec]


def _build_residual(side: Side, head_dim: int, settings: dict[str, Any]) -> Codec:
    shared = {name: settings[name] for name in ("group", "codebook_size", "stages", "beam", "iterations", "max_vectors")}
    pre_rope = side == "key" and settings["rope"] == "pre"
    grouping = settings[f"{side}_groups"]
    return ResidualCodec(head_dim, ResidualSettings(**shared, grouping=grouping, pre_rope=pre_rope))


def _build_identity(side: Side, head_dim: int, settings: dict[str, Any]) -> Codec:
    return IdentityCodec(head_dim, **settings)


_RVQ: dict[str, Any] = {
    "group": 32,
    "codebook_size": 256,
    "stages": 8,
    "beam": 1,
    "rope": "pre",
    "key_groups": "strided",
    "value_groups": "contiguous",
    "iterations": 10,
    "max_vectors": 65536,
}
_PAPER = "Kumar 2024, arXiv 2410.15704"

METHODS: dict[str, Method] = {
    "rvq": Method("residual VQ, 8 stages of 256 codewords", _PAPER, _RVQ, _build_residual),
    "rvq-paper": Method(
        "residual VQ, 8 stages of 2048 codewords, greedy", _PAPER, {**_RVQ, "codebook_size": 2048}, _build_residual
    ),
    "identity": Method("no compression, the cache's own yardstick", "kvfold", {"dtype": "float32"}, _build_identity),
}

_CHOICES = {
    "rope": ("pre", "post"),
    "key_groups": ("strided", "contiguous"),
    "value_groups": ("strided", "contiguous"),
}


def method(name: str) -> Method:
    """The method called `name`; InputError naming the others if there is none."""
    if name not in METHODS:
        raise InputError(f"a codec among {', '.join(METHODS)}", repr(name), "see `kvfold codecs`")
    return METHODS[name]


def resolve_settings(name: str, changes: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Defaults of method `name` with `changes` (values may be strings) applied.

    `bits=X` stands for the number of stages that comes to at most `X` bits per element at this head dim.

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
        settings["stages"] = _stages_for(_convert("bits", bits, float), settings, head_dim)
    return settings


def build_codec(name: str, side: Side, head_dim: int, settings: dict[str, Any]) -> Codec:
    """An unfitted codec of method `name` for one side of one layer; `settings` as `resolve_settings` returns them."""
    return method(name).build(side, head_dim, settings)


def _convert(key: str, value: Any, to: type) -> Any:
    try:
        converted = to(value)
        if to in (int, float) and (not math.isfinite(converted) or converted != float(value)):
            raise ValueError(value)
    except (TypeError, ValueError, OverflowError):
        kind = {int: "a whole number", float: "a number"}.get(to, "text")
        raise InputError(f"{kind} for {key}", repr(value), "correct the value") from None
    if key in _CHOICES and converted not in _CHOICES[key]:
        raise InputError(f"{key} among {', '.join(_CHOICES[key])}", repr(value), "choose one of these")
    return converted


def _stages_for(bits: float, settings: dict[str, Any], head_dim: int) -> int:
    one = ResidualCodec(head_dim, ResidualSettings(group=settings["group"], codebook_size=settings["codebook_size"], stages=1))
    code_bytes = int((bits * head_dim - 16) / 8 + 1e-9)
    stages = 8 * code_bytes // (one.bits * one.groups)
    if stages < 1:
        fix = "raise bits, or set a larger group or smaller codebook_size"
        raise InputError(f"bits of at least {one.bits_per_element:g}", f"{bits:g}", fix)
    return stages


__all__ = ["KINDS", "METHODS", "Codec", "Method", "Side", "build_codec", "method", "resolve_settings"]
