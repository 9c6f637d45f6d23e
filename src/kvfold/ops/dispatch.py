"""Which backend runs an op: an argument, else `KVFOLD_BACKEND`, else the best there is for the tensors' device.

A forced backend that is missing raises and says why; falling back to plain PyTorch by itself is logged once. There is one
switch for all ops.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache

from kvfold.errors import InputError
from kvfold.ops import native
from kvfold.ops.attend import cpu as cpu_attend
from kvfold.ops.attend import naive as naive_attend
from kvfold.ops.decode import cpu as cpu_decode
from kvfold.ops.decode import naive as naive_decode
from kvfold.ops.encode import cpu as cpu_encode
from kvfold.ops.encode import naive as naive_encode

_BACKENDS: dict[str, dict[str, Callable]] = {
    "naive": {
        "encode": naive_encode.encode,
        "decode": naive_decode.decode,
        "attend": naive_attend.attend,
        "attend_exact": naive_attend.attend_exact,
    },
    "cpu": {
        "encode": cpu_encode.encode,
        "decode": cpu_decode.decode,
        "attend": cpu_attend.attend,
        "attend_exact": cpu_attend.attend_exact,
    },
}


def available_backends() -> list[str]:
    """Names of the backends that can run here."""
    return [name for name in _BACKENDS if _missing(name) is None]


def select(op: str, backend: str | None = None, device: str = "cpu") -> Callable:
    """The function of `op` ("encode", "decode", "attend", "attend_exact") for tensors on a device of that type.

    Raises:
        InputError: the backend asked for, or named by `KVFOLD_BACKEND`, is unknown or missing.
    """
    name = backend or os.environ.get("KVFOLD_BACKEND") or "auto"
    if name == "auto":
        name = _automatic() if device == "cpu" else "naive"
    why = _missing(name)
    if why is not None:
        known = ", ".join(available_backends())
        raise InputError(f"a backend among auto, {known}", f"{name!r} ({why})", "unset KVFOLD_BACKEND or choose another")
    return _BACKENDS[name][op]


def _missing(name: str) -> str | None:
    """Why a backend cannot run, None if it can."""
    if name == "cpu":
        return None if native.available_isas() else native.MISSING
    if name == "gpu":
        return "this version of kvfold has no Triton ops"
    return None if name in _BACKENDS else "there is no backend of that name"


@cache
def _automatic() -> str:
    if native.available_isas():
        return "cpu"
    logging.getLogger("kvfold").warning("%s. Until then everything runs as plain PyTorch, slowly.", native.MISSING)
    return "naive"
