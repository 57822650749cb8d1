"""Compiles forms of the pass for a named architecture, with no GPU, and disassembles them (used by bench/sass.py)."""

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

from . import launch, passes

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Form:
    """The compile-time arguments of ``pass_kernel``, dtypes by their torch names; K streams as the launcher treats them."""

    distribution: str = "gaussian"
    src: str = "bfloat16"
    dst: str = ""  # src
    k: int = 1
    hessian: int = 0
    stochastic: bool = False
    decay: bool = False
    residual: int = 0  # bits; written where the pass is in place, without dst


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


def compile_pass(form: Form, capability: int) -> Compiled:
    """Compile one form as the launcher would and disassemble it."""
    dtype = {str(t).removeprefix("torch."): d for t, d in launch._DTYPES.items()}
    constants: dict[str, Any] = passes.constants(
        dtype[form.src], dtype[form.dst or form.src], launch._DISTRIBUTIONS[form.distribution], form.hessian,
        form.stochastic, form.decay, form.k, form.residual, not form.dst,
    )  # fmt: skip
    pointers = {"table": "*i64", "runs": "*i32", "go": "*i32", "streams": "*i64", "update": "*i64", "counters": "*i64"}
    pointers |= {"digits": "*i8", "totals": "*i32"}
    pointers |= dict.fromkeys(("coeffs", "restore", "curvature", "decay", "smoothing", "scales"), "*fp32")
    scalars = dict.fromkeys(("k0", "k1", "n_tensors", "n_streams", "n_steps"), "i32") | dict.fromkeys(
        ("hessian_min", "hessian_max"), "fp32"
    )
    signature = {n: (pointers | scalars).get(n, "constexpr") for n in passes.pass_kernel.arg_names}
    aligned = [("tt.divisibility", 16)]  # what the launcher allocates itself, and what a launch finds of it
    own = ("table", "runs", "go", "digits", "totals", "scales")
    attributes = {(passes.pass_kernel.arg_names.index(n),): [list(a) for a in aligned] for n in own}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = triton.compile(
            ASTSource(passes.pass_kernel, signature, constants, attributes),
            target=GPUTarget("cuda", capability, 32),
            options=launch.options(),
        )
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
