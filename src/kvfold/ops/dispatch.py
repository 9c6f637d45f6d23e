"""Which backend runs an op: an argument, else `KVFOLD_BACKEND`, else the best there is.

A forced backend that is missing raises and says why; there is one switch for all ops.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from kvfold.errors import InputError
from kvfold.ops.attend import naive as naive_attend
from kvfold.ops.decode import naive as naive_decode
from kvfold.ops.encode import naive as naive_encode

_BACKENDS: dict[str, dict[str, Callable]] = {
    "naive": {"encode": naive_encode.encode, "decode": naive_decode.decode, "attend": naive_attend.attend},
}
_MISSING = {"cpu": "this version of kvfold has no native CPU ops", "gpu": "this version of kvfold has no Triton ops"}


def available_backends() -> list[str]:
    """Names of the backends that can run here."""
    return list(_BACKENDS)


def select(op: str, backend: str | None = None) -> Callable:
    """The function of `op` ("encode", "decode", "attend").

    Raises:
        InputError: the backend asked for, or named by `KVFOLD_BACKEND`, is unknown or missing.
    """
    name = backend or os.environ.get("KVFOLD_BACKEND") or "auto"
    if name == "auto":
        name = "naive"
    if name not in _BACKENDS:
        why = _MISSING.get(name, "there is no backend of that name")
        raise InputError(
            f"a backend among auto, {', '.join(_BACKENDS)}", f"{name!r} ({why})", "unset KVFOLD_BACKEND or choose another"
        )
    return _BACKENDS[name][op]
