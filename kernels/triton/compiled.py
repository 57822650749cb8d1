"""Compiles a kernel of this folder for a named architecture, with no GPU, and disassembles it (bench/sass.py, tests)."""

import os
import re
import subprocess
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launch import KERNELS, options

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
AMD = ("gfx90a", "gfx942")


@dataclass(frozen=True)
class Compiled:
    """What ptxas made: the instructions as nvdisasm prints them, and the resources a thread or program takes."""

    text: str
    registers: int
    stack: int
    shared: int
    local: int


def architectures() -> list[int]:
    """Compute capabilities, from 80, that the ptxas of this triton compiles for."""
    names = subprocess.run([_BIN / "ptxas", "--help"], capture_output=True, text=True, check=True).stdout
    known = {int(a) for a in re.findall(r"'sm_(\d+)'", names)}
    return [a for a in (80, 86, 89, 90, 100, 103, 120) if a in known]


def compile_form(name: str, form: dict[str, Any], architecture: int | str) -> Any:
    """Compile one form of a kernel as a launch would, for a compute capability or an AMD architecture."""
    kernel = KERNELS[name]
    signature = {p.name: "constexpr" if p.is_constexpr else p.annotation_type for p in kernel.function.params}
    nvidia = isinstance(architecture, int)
    target = GPUTarget("cuda", architecture, 32) if nvidia else GPUTarget("hip", architecture, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return triton.compile(
            ASTSource(kernel.function, signature, form, {}), target=target, options=options(kernel.warps)
        )


def disassemble(compiled: Any) -> Compiled:
    """The instructions and resources of a kernel that was compiled for an NVIDIA GPU."""
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as f:
        f.write(compiled.asm["cubin"])
    try:
        text = subprocess.run([_BIN / "nvdisasm", "-c", f.name], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run([_BIN / "cuobjdump", "-res-usage", f.name], capture_output=True, text=True, check=True)
    finally:
        os.unlink(f.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage.stdout!r} {usage.stderr!r}")
    registers, stack, shared, local = map(int, found.groups())
    return Compiled(text, registers, stack, max(shared, compiled.metadata.shared), local)
