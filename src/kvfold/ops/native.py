"""The compiled CPU ops: which module runs here, and codebooks made ready for it.

There is one module an instruction set: `_cpu_portable`, `_cpu_avx2`, `_cpu_avx512`, and `_cpu_amx`, AVX-512 with a matrix unit.
The best that the CPU has is used, or the one that `KVFOLD_CPU_ISA` names. Without a compiler at installation there is none,
and the ops run as plain PyTorch.
"""

from __future__ import annotations

import importlib
import os
import weakref
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kvfold.errors import InputError

ISAS = ("amx", "avx512", "avx2", "portable")
MISSING = "kvfold was installed without its native CPU ops: install a C++ compiler (GCC or Clang), then kvfold again"
LIBRARY = torch.library.Library("kvfold", "DEF")


def available_isas() -> list[str]:
    """Instruction sets whose module is installed and runs on this CPU, the best first."""
    portable = _module("portable")
    return [] if portable is None else [isa for isa in ISAS if portable.supports(isa) and _module(isa) is not None]


def isa() -> str:
    """The instruction set whose module is used; raises as `module`."""
    return _chosen(os.environ.get("KVFOLD_CPU_ISA"))[0]


def module() -> ModuleType:
    """The module that is used.

    Raises:
        InputError: there is none, or `KVFOLD_CPU_ISA` names one that does not run here.
    """
    return _chosen(os.environ.get("KVFOLD_CPU_ISA"))[1]


@cache
def _chosen(wanted: str | None) -> tuple[str, ModuleType]:
    isas = available_isas()
    if not isas:
        raise InputError("native CPU ops", MISSING, "or unset KVFOLD_BACKEND")
    wanted = wanted or isas[0]
    if wanted not in isas:
        raise InputError(f"an instruction set among {', '.join(isas)}", repr(wanted), "unset KVFOLD_CPU_ISA or choose another")
    chosen = _module(wanted)
    assert chosen is not None
    return wanted, chosen


_modules: dict[str, ModuleType | None] = {}


def _module(isa: str) -> ModuleType | None:
    if isa not in _modules:
        try:
            _modules[isa] = importlib.import_module(f"kvfold.ops._cpu_{isa}")
        except ImportError:
            _modules[isa] = None
    return _modules[isa]


# What an op calls for every layer of every token was chosen for being little code: between two calls of an op the processor's
# caches are full of codes, and what takes PyTorch a microsecond when called again and again takes ten (docs/performance.md).


def array(tensor: Tensor) -> Any:
    """`tensor` as the modules take it, without copying: a DLPack capsule."""
    return _capsule(tensor.detach() if tensor.requires_grad else tensor)


def dense(tensor: Tensor, dtype: torch.dtype) -> Any:
    """`tensor` as the modules take it, of that type and without gaps: copied only if it is not."""
    return array(tensor if tensor.dtype is dtype and tensor.is_contiguous() else tensor.to(dtype).contiguous())


_capsule = torch.utils.dlpack.to_dlpack


def floats(*shape: int) -> Tensor:
    """An uninitialized float32 tensor on the CPU: `torch.empty` told the type and place, or `new_empty`, take twice as long."""
    return torch.FloatTensor(*shape)


def eager(tensor: Tensor) -> bool:
    """Whether an op on `tensor` may be called itself: `torch.library`, which tells `torch.compile` and fake tensors of its
    shapes, takes as long as a small op does."""
    return type(tensor) is Tensor and not torch.compiler.is_compiling()


def version(tensor: Tensor) -> int:
    """How often `tensor` was written to; 0 for one made in `torch.inference_mode()`, which does not count."""
    return 0 if tensor.is_inference() else tensor._version


def books(codebooks: Tensor, book: Tensor, channels: Tensor | None = None) -> Any:
    """Codebooks made ready, once for as long as the tensor `codebooks` lives and is not written to.

    `channels` are needed by attention; encoding and decoding know none.
    """
    native, now = module(), version(codebooks)
    owner, known = _ready.get(id(codebooks), (None, []))
    if owner is None or owner() is not codebooks:
        place, known = id(codebooks), []
        _ready[place] = (weakref.ref(codebooks, lambda gone: _forget(place, gone)), known)
    for then, other_book, other_channels, other_module, ready in known:
        same = then == now and other_module is native and _equal(other_book, book)
        if same and (channels is None or (other_channels is not None and _equal(other_channels, channels))):
            return ready
    order = torch.arange(book.shape[2] * codebooks.shape[2]).view(book.shape[2], -1) if channels is None else channels
    table = codebooks.detach().float().contiguous()
    ready = native.make_books(array(table), *(array(part.to(torch.int64).contiguous()) for part in (book, order)))
    # Those that know channels serve every op, so what was made without (encoding comes first) is let go of.
    known[:] = [entry for entry in known if entry[0] == now and entry[2] is not None]
    known.append((now, book, channels, native, ready))
    return ready


# By the tensor's id, which another may get when it is gone: a dictionary of weak keys does as much, with more code.
_ready: dict[int, tuple[weakref.ref, list]] = {}


def _forget(place: int, owner: weakref.ref) -> None:
    if place in _ready and _ready[place][0] is owner:
        del _ready[place]


def _equal(first: Tensor, second: Tensor) -> bool:
    return first is second or (first.shape == second.shape and torch.equal(first, second.to(first.dtype)))
