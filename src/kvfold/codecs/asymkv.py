"""AsymKV: more bits for keys than for values, and for the first layers (Tao et al., arXiv 2410.13212, section 4).

An error of a key is multiplied by the query and then exponentiated, one of a value enters the output as it is; and errors of
early layers go through all later ones. So the integers of `kivi.py` have two widths, and two numbers say which where:

    keys of layers 0 .. key_layers - 1 and values of layers 0 .. value_layers - 1 have `high` bits, all others `low`.

Keys are coded after RoPE, in blocks of `group` tokens, values in groups of channels:  bits per element = width + 32 / group.
With a budget, `calibrate/search.py` chooses the two numbers by what the model says.
"""

from __future__ import annotations

from typing import Any

from kvfold.codecs.base import Side
from kvfold.codecs.kivi import KiviCodec
from kvfold.errors import InputError


def build_asymkv(side: Side, head_dim: int, settings: dict[str, Any], layer: int) -> KiviCodec:
    """The codec of layer `layer`, counted from the input."""
    high, low = settings["high"], settings["low"]
    if not 1 <= low < high <= 8:
        raise InputError("low below high, both from 1 to 8", f"low={low} high={high}", "choose other widths")
    for name in ("key_layers", "value_layers"):
        if settings[name] < 0:
            raise InputError(f"{name} of at least 0", str(settings[name]), "raise it")
    bits = high if layer < settings[f"{side}_layers"] else low
    return KiviCodec(head_dim, "channel" if side == "key" else "token", bits, settings["group"])
