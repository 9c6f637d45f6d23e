"""A decode step's attention in CUDA C++ (`step.cu`), for what Triton cannot say: integer atomics in shared memory, codewords
that stand twice in it, and which thread holds which channel. `gpu_step.py` prepares its queries, and takes every step that
`takes` refuses.

The source is compiled by NVRTC for one form of codes when that is first met, in one or two seconds, through NVIDIA's
`cuda-bindings`; recent CUDA builds of PyTorch bring both. Without them, or without a recent NVIDIA GPU, steps stay with Triton.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
from importlib import resources
from typing import Any

import torch
import triton
from torch import Tensor

from kvfold.ops.attend.gpu_parts import MOST_SPLITS, mask_strides
from kvfold.ops.attend.naive import Coded, Rotation

DIM = 32  # channels of a group
_ROWS = 4  # query rows of a block
_WARPS = {True: 12, False: 20}  # of a block, with keys before RoPE and after
_OVERHEAD = 1500  # a block's cost in keys beside that of its keys: tables or codewords copied, masses times codebooks
_SOURCES = ("step.cu", "step_ptx.cuh", "step_parts.cuh", "step_turned.cuh", "step_tables.cuh")


class _Side(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("codes", "scale", "codes_b", "codes_g", "codes_t", "scale_b", "scale_g", "scale_t", "codebooks", "book")
    ]

    @classmethod
    def of(cls, coded: Coded, codebooks: Tensor, book: Tensor) -> _Side:
        packed, scale = coded.packed, coded.scale
        strides = (*packed.stride()[:3], *scale.stride()[:3])
        return cls(packed.data_ptr(), scale.data_ptr(), *strides, codebooks.data_ptr(), book.data_ptr())


class _Step(ctypes.Structure):
    """`Step` of `step_parts.cuh`."""

    _fields_ = [
        ("keys", _Side),
        ("values", _Side),
        *((name, ctypes.c_int64) for name in ("mask", "mask_b", "mask_q", "mask_t", "turning", "frequency", "positions")),
        *((name, ctypes.c_int64) for name in ("positions_b", "turns", "consecutive", "eighths_b", "tables")),
        *((name, ctypes.c_int64) for name in ("logits", "out", "lse")),
        *((name, ctypes.c_float) for name in ("softmax_scale", "softcap")),
        *((name, ctypes.c_int32) for name in ("heads", "rows", "queries", "tokens", "each", "batches")),
    ]


def takes(key: Coded, value: Coded, turned: bool, rows: int) -> bool:
    """Whether these codes, which `gpu_step.takes` admits, are of a form that `step.cu` knows and fit a GPU's shared memory."""
    stages, heads, _ = key.book.shape
    own = turned and len(key.codebooks) > stages * heads  # of groups: they do not fit, and the cache serves Triton better
    return not own and _served(key) and _served(value) and _bytes(key, value, turned, rows) <= _room(key, turned, rows)


def _served(coded: Coded) -> bool:
    stages, _, groups = coded.book.shape
    return coded.channels.shape[1] == DIM and stages * groups % 4 == 0 and _aligned(coded) >= 4


def _aligned(coded: Coded) -> int:
    """Bytes that a load of codes can take at once."""
    packed = coded.packed
    return math.gcd(16, packed.data_ptr(), packed.shape[3], *packed.stride()[:3])


def _bytes(key: Coded, value: Coded, turned: bool, rows: int) -> int:
    """Of dynamic shared memory that a block needs, where no codeword of the keys stands twice."""
    block = _block(rows)
    stages, _, groups = value.book.shape
    masses = stages * groups * block * 4 * (value.codebooks.shape[1] + DIM)
    stages, _, groups = key.book.shape
    return max(masses, stages * key.codebooks.shape[1] * 2 * (DIM if turned else groups * block))


def _room(key: Coded, turned: bool, rows: int) -> int:
    """Bytes of dynamic shared memory there are for a block: all but its softmaxes and the factors of its rows."""
    block = _block(rows)
    return _shared_memory(key.packed.device) - _WARPS[turned] * block * 16 - turned * 128 * block * key.book.shape[2]


def _block(rows: int) -> int:
    return min(_ROWS, triton.next_power_of_2(rows))


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory a block may use; 0 where this kernel does not run, which is said if a package would help."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    properties: Any = torch.cuda.get_device_properties(device)
    if properties.major < 8:
        return 0
    if can_compile(10 * properties.major + properties.minor):
        return properties.shared_memory_per_block_optin
    fix = "pip install kvfold[nvrtc], as new as the GPU. Until then decode steps run in Triton, two or three times as long."
    logging.getLogger("kvfold").warning("NVIDIA's run-time compiler or cuda-bindings is missing or too old: %s", fix)
    return 0


@functools.cache
def can_compile(capability: int) -> bool:
    """Whether cuda-bindings and the compiler are there, in versions that belong together, and know such a GPU (90: an H100)."""
    try:
        from cuda.bindings import nvrtc

        return capability in _done(nvrtc.nvrtcGetSupportedArchs())
    except (ImportError, RuntimeError):
        return False


def partial(
    turning: Tensor,
    frequency: Tensor,
    tables: Tensor | None,
    logits: Tensor,
    key: Coded,
    value: Coded,
    rotation: Rotation | None,
    mask: Tensor | None,
    softmax_scale: float,
    softcap: float | None,
    queries: int,
    processors: int,
) -> tuple[Tensor, Tensor]:
    """What `gpu_step.partial` returns.

    Args:
        turning, frequency: of `gpu_step._queries`.
        tables: of `gpu_step._tables`, for keys after RoPE; None for keys before it.
        logits: float32 `[B * G, T, rows, padded to a power of 2]`, overwritten; what a rotated center adds, if the key has one.
    """
    turned = tables is None
    pairs, tokens, tall = logits.shape
    rows = turning.shape[2]
    block = _block(rows)
    made: dict[str, Any] = {"dtype": torch.float32, "device": logits.device}
    size = _bytes(key, value, turned, rows)
    twice = 0
    if turned:
        table = key.codebooks.shape[1] * DIM * 2
        twice = min(len(key.book), _room(key, turned, rows) // table - len(key.book))
        size = max(size, (len(key.book) + twice) * table)
    names = {
        **_form("K", key), **_form("V", value),
        **{"ROWS": block, "TALL": tall, "WARPS": _WARPS[turned], "TURNED": int(turned), "TWICE": twice},
        "POSITION": "i64" if rotation is not None and rotation.positions.dtype == torch.int64 else "int",
        **{"MORE": int(key.center is not None), "MASKED": int(mask is not None), "CAPPED": int(softcap is not None)},
    }  # fmt: skip
    splits, each = _splits(pairs * triton.cdiv(rows, block), tokens, processors)
    out = torch.empty(splits, pairs, rows, value.channels.numel(), **made)
    lse = torch.empty(splits, pairs, rows, **made)
    held = [x for side in (key, value) for x in (side.codebooks.contiguous(), side.book.to(torch.int64).contiguous())]
    step = _Step(_Side.of(key, *held[:2]), _Side.of(value, *held[2:]), softmax_scale=softmax_scale, softcap=softcap or 0.0)
    step.heads, step.rows, step.queries, step.tokens, step.each = key.packed.shape[1], rows, queries, tokens, each
    pointers = {"turning": turning, "frequency": frequency, "logits": logits, "out": out, "lse": lse}
    if mask is not None:
        pointers["mask"], (step.mask_b, step.mask_q, step.mask_t) = mask, mask_strides(mask)[1]
    if tables is not None:
        pointers["tables"] = tables
    else:
        assert rotation is not None
        pointers["positions"] = positions = rotation.positions.contiguous()
        step.batches, eighths = len(positions), triton.cdiv(tokens, 8)
        turns = torch.empty(len(positions), eighths, 2, turning.shape[-1], dtype=torch.float16, device=out.device)
        pointers |= {"turns": turns, "consecutive": torch.empty(turns.shape[:2], dtype=torch.bool, device=out.device)}
        if len(positions) > 1:
            step.positions_b, step.eighths_b = tokens, eighths
    for name, tensor in pointers.items():
        setattr(step, name, tensor.data_ptr())
    kernels = _kernels(out.device, size, tuple(names.items()))
    if tables is None:
        _launch(kernels["turns"], (triton.cdiv(turns.numel() // 2, 256), 1, 1), 256, 0, step, out.device)
    _launch(kernels["step"], (splits, pairs, triton.cdiv(rows, block)), 32 * _WARPS[turned], size, step, out.device)
    return out, lse


def _form(side: str, coded: Coded) -> dict[str, int | str]:
    stages, _, groups = coded.book.shape
    scale = "u8" if coded.scale.dtype == torch.uint8 else "u16"
    named: dict[str, int | str] = {"STAGES": stages, "GROUPS": groups, "SIZE": coded.codebooks.shape[1], "SCALE": scale}
    named["LOAD"] = _aligned(coded)
    return {f"{side}_{name}": it for name, it in named.items()}


def _splits(blocks: int, tokens: int, processors: int) -> tuple[int, int]:
    """Splits of the keys and keys of each, such that the last block ends first: a multiprocessor has one at a time."""

    def end(splits: int) -> int:
        return triton.cdiv(blocks * splits, processors) * (triton.cdiv(tokens, splits) + _OVERHEAD)

    splits = min(range(1, 1 + min(MOST_SPLITS, triton.cdiv(tokens, 128))), key=end)
    each = triton.cdiv(triton.cdiv(tokens, splits), 128) * 128
    return triton.cdiv(tokens, each), each


def _launch(kernel: Any, grid: tuple[int, int, int], threads: int, shared: int, step: _Step, device: torch.device) -> None:
    from cuda.bindings import driver

    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(step))
    stream = torch.cuda.current_stream(device).cuda_stream
    _done(driver.cuLaunchKernel(kernel, *grid, threads, 1, 1, shared, stream, ctypes.addressof(arguments), 0))


@functools.cache
def _kernels(device: torch.device, shared: int, names: tuple[tuple[str, int | str], ...]) -> dict[str, Any]:
    """The kernels of `step.cu` for a form of codes, loaded on a device."""
    from cuda.bindings import driver

    with torch.cuda.device(device):
        module = _done(driver.cuModuleLoadData(compiled(names, "{}{}".format(*torch.cuda.get_device_capability(device)))))
        kernels = {"step": _done(driver.cuModuleGetFunction(module, b"step"))}
        if dict(names)["TURNED"]:
            kernels["turns"] = _done(driver.cuModuleGetFunction(module, b"turns"))
        most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _done(driver.cuFuncSetAttribute(kernels["step"], most, shared))
    return kernels


def compiled(names: tuple[tuple[str, int | str], ...], capability: str) -> bytes:
    """`step.cu` with these names given, as machine code for a compute capability such as "90".

    Raises:
        RuntimeError: with the compiler's words, if it does not compile.
    """
    from cuda.bindings import nvrtc

    source, *headers = (resources.files("kvfold.ops.attend").joinpath(name).read_bytes() for name in _SOURCES)
    included = [name.encode() for name in _SOURCES[1:]]
    program = _done(nvrtc.nvrtcCreateProgram(source, b"step.cu", len(headers), headers, included))
    options = [f"--gpu-architecture=sm_{capability}", "--std=c++17", *(f"-D{name}={it}" for name, it in names)]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = bytearray(_done(nvrtc.nvrtcGetProgramLogSize(program)))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"step.cu does not compile for sm_{capability}: {log.decode().strip()}")
    code = bytearray(_done(nvrtc.nvrtcGetCUBINSize(program)))
    _done(nvrtc.nvrtcGetCUBIN(program, code))
    nvrtc.nvrtcDestroyProgram(program)
    return bytes(code)


def _done(answer: tuple) -> Any:
    """What a call of the driver or the compiler returned beside its error."""
    error, *rest = answer
    if int(error) != 0:
        raise RuntimeError(f"expected CUDA to answer success, got {error!r}")
    return rest[0] if rest else None
