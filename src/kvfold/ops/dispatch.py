"""Which backend runs an op: an argument, else `KVFOLD_BACKEND`, else the best there is for the tensors' device.

`naive` is plain PyTorch on any device, `cpu` is C++, `gpu` is Triton for CUDA devices; in Triton's interpreter
(`TRITON_INTERPRET=1`) that runs on a CPU too, slowly and only where asked for. A forced backend that is missing raises and says
why; falling back to plain PyTorch by itself is logged once. There is one switch for all ops.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from functools import cache, partial

import torch

from kvfold.errors import InputError
from kvfold.ops import native, rope
from kvfold.ops.attend import cpu as cpu_attend
from kvfold.ops.attend import naive as naive_attend
from kvfold.ops.attend import pages
from kvfold.ops.decode import cpu as cpu_decode
from kvfold.ops.decode import naive as naive_decode
from kvfold.ops.encode import cpu as cpu_encode
from kvfold.ops.encode import naive as naive_encode
from kvfold.ops.encode.code import code
from kvfold.ops.encode.pages import code_pages
from kvfold.ops.interpreter import interpreted

_BACKENDS: dict[str, dict[str, Callable]] = {
    "naive": {
        "encode": naive_encode.encode,
        "code": partial(code, naive_encode.encode),
        "code_pages": partial(code_pages, partial(code, naive_encode.encode)),
        "decode": naive_decode.decode,
        "unrotate": rope.unrotate,
        "attend": naive_attend.attend,
        "attend_exact": naive_attend.attend_exact,
        "attend_both": partial(naive_attend.attend_both, naive_attend.attend, naive_attend.attend_exact),
        "attend_pages": partial(pages.attend_pages, naive_attend.attend),
    },
    "cpu": {
        "encode": cpu_encode.encode,
        "code": cpu_encode.code,
        "code_pages": cpu_encode.code_pages,
        "decode": cpu_decode.decode,
        "unrotate": rope.unrotate_cpu,
        "attend": cpu_attend.attend,
        "attend_exact": cpu_attend.attend_exact,
        "attend_both": cpu_attend.attend_both,
        "attend_pages": cpu_attend.attend_pages,
    },
}


def available_backends() -> list[str]:
    """Names of the backends that can run here."""
    return [name for name in (*_BACKENDS, "gpu") if _missing(name) is None]


def select(op: str, backend: str | None = None, device: str = "cpu") -> Callable:
    """The function of `op` ("encode", "decode", "attend", ...) for tensors on a device of that type.

    Raises:
        InputError: the backend asked for, or named by `KVFOLD_BACKEND`, is unknown, missing or for another device.
    """
    name = backend or os.environ.get("KVFOLD_BACKEND") or "auto"
    automatic = name == "auto"
    if automatic:
        name = _automatic(device) if device in ("cpu", "cuda") else "naive"
    why = None if automatic else _missing(name)
    if why is None and (name, device) in (("cpu", "cuda"), ("gpu", "cpu")) and not (name == "gpu" and interpreted()):
        why = f"which does not run on {device}"
    if why is not None:
        known = ", ".join(available_backends())
        raise InputError(f"a backend among auto, {known}", f"{name!r} ({why})", "unset KVFOLD_BACKEND or choose another")
    return (_gpu() if name == "gpu" else _BACKENDS[name])[op]


def _missing(name: str) -> str | None:
    """Why a backend cannot run, None if it can."""
    if name == "cpu":
        return None if native.available_isas() else native.MISSING
    if name == "gpu":
        if importlib.util.find_spec("triton") is None:
            return "there is no Triton: pip install kvfold[gpu]"
        return None if torch.cuda.is_available() or interpreted() else "there is no CUDA device"
    return None if name in _BACKENDS else "there is no backend of that name"


@cache
def _gpu() -> dict[str, Callable]:
    """Imported when first needed: Triton takes a second, and has to know by then whether it is to interpret."""
    encode, decode, attend = (importlib.import_module(f"kvfold.ops.{op}.gpu") for op in ("encode", "decode", "attend"))
    found = {"encode": encode.encode, "decode": decode.decode, "attend": attend.attend, "unrotate": rope.unrotate}
    found |= {"attend_pages": partial(pages.attend_pages, attend.attend), "code": encode.code}
    found["code_pages"] = partial(code_pages, encode.code)
    exact = naive_attend.attend_exact  # exact tokens are few: PyTorch's own products
    return {**found, "attend_exact": exact, "attend_both": partial(naive_attend.attend_both, attend.attend, exact)}


@cache
def _automatic(device: str) -> str:
    best = "gpu" if device == "cuda" else "cpu"
    why = _missing(best)
    if why is None:
        return best
    logging.getLogger("kvfold").warning("%s. Until then everything runs as plain PyTorch, slowly.", why)
    return "naive"
