"""Compiles every Triton kernel for an H100, as the ops would launch it there, on a machine that has none; run by test_gpu.py.

Launches are recorded instead of run, then compiled by Triton and its assembler. Prints a line a kernel: name, launch, registers
a thread and bytes spilled, where the toolkit's cuobjdump is at hand.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvfold import ops
from kvfold.ops.attend import gpu as attend
from kvfold.ops.attend import gpu_step
from kvfold.ops.decode import gpu as decode
from kvfold.ops.encode import gpu as encode
from kvfold.packing import pack

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.bool: "*i1",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
KERNELS = ("_scaled", "_queries", "_scores", "_tables", "_look_up", "_mix", "_attend", "_join", "_greedy", "_beam", "_decode")
DIVISIBLE = [["tt.divisibility", 16]]


class Recorder:
    """Stands in for a kernel: `kernel[grid](...)` is compiled and reported."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        return self.compile

    def compile(self, *args: Any, num_warps: int = 4, num_stages: int = 3, **named: Any) -> None:
        given = dict(zip(self.kernel.arg_names, args, strict=False)) | named
        signature, fixed, known = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):  # specialised as Triton does: 1 and multiples of 16
            value = given[parameter.name]
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[parameter.name], fixed[(index,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name], known[(index,)] = POINTERS[value.dtype], DIVISIBLE
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
                if isinstance(value, int) and value % 16 == 0:
                    known[(index,)] = DIVISIBLE
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=fixed, attrs=known)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        shape = {self.kernel.params[at[0]].name: value for at, value in fixed.items()}
        print(
            f"compiled {self.kernel.__name__}: {usage(made.asm['cubin'])}, {made.metadata.shared} bytes shared, {shape}",
            flush=True,
        )


def usage(cubin: bytes) -> str:
    """Registers and stack of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return "registers unknown"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    return "registers unknown" if found is None else f"{found[1]} registers, {found[2]} bytes of stack"


def coded(tokens: int, dim: int, group: int, size: int, stages: int, half: bool) -> ops.Coded:
    groups, bits = dim // group, (size - 1).bit_length()
    packed = pack(torch.zeros(1, 2, tokens, stages * groups, dtype=torch.int32), bits)
    scale = torch.ones(1, 2, tokens, 1, dtype=torch.float16) if half else torch.ones(1, 2, tokens, 1, dtype=torch.uint8)
    book = torch.zeros(stages, 2, groups, dtype=torch.int64)
    return ops.Coded(packed, scale, torch.zeros(1, size, group).half(), book, torch.arange(dim).view(groups, group), bits)


def attention(dim: int, queries: int, way: str, dtype: torch.dtype, size: int = 256, heads: int = 8) -> None:
    key, value = coded(4096, dim, 32, size, 8, half=False), coded(4096, dim, 32, size, 9, half=True)
    if way == "center":
        key = key._replace(center=torch.zeros(2, dim))
    rotation = None if way == "post" else ops.Rotation(torch.arange(4096)[None], torch.ones(dim // 2), 1.0, False)
    mask = None if queries == 1 else torch.ones(1, 1, queries, 4096, dtype=torch.bool)
    attend.attend(torch.zeros(1, heads, queries, dim, dtype=dtype), key, value, rotation, mask, 1.0)


def main(everything: bool) -> None:
    for module in (attend, gpu_step, encode, decode):
        for name, thing in list(vars(module).items()):
            if isinstance(thing, triton.JITFunction) and name in KERNELS:
                setattr(module, name, Recorder(thing))
    attend.processors = lambda device: 132
    attention(128, 1, "post", torch.bfloat16)
    attention(128, 1, "pre", torch.bfloat16)
    attention(128, 1, "center", torch.bfloat16)
    attention(64, 1, "center", torch.float32)
    attention(128, 512, "pre", torch.bfloat16)
    if everything:
        attention(128, 1, "post", torch.bfloat16, heads=32)
        attention(128, 4, "pre", torch.bfloat16)
        attention(64, 1, "pre", torch.bfloat16, heads=6)
        attention(128, 512, "post", torch.bfloat16)
        attention(128, 512, "center", torch.bfloat16)
        attention(128, 512, "pre", torch.float32)
        attention(96, 1, "pre", torch.float32, size=2048)
        attention(256, 1, "pre", torch.bfloat16)
        attention(256, 512, "pre", torch.bfloat16)
    vectors, tables = torch.zeros(1, 2, 4096, 4, 32), torch.zeros(8, 256, 32).half()
    book = torch.arange(8)[:, None, None].expand(-1, 2, 4)
    for beam in (1, 4, 16) if everything else (1, 4):
        encode.encode(vectors, tables, book, beam)
    encode.scaled_groups(torch.zeros(1, 2, 4096, 128).bfloat16(), torch.arange(128).view(4, 32), 8)
    encode.encode_statistics(vectors.view(-1, 32), tables.float())
    encode.encode_packed(vectors, tables, book, 1, 8)
    decode.decode(torch.zeros(1, 2, 4096, 8, 4, dtype=torch.int32), tables, book)


if __name__ == "__main__":
    import sys

    main("--all" in sys.argv)
