"""How a kernel is declared, compiled and launched: what Triton compiles is decided here and in forms.py alone."""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

import triton
import triton.language as tl
from triton.runtime import driver

# The type of each parameter, whatever the kernel. Matrices of gathered rows are addresses: their form says their types.
TYPES = (
    dict.fromkeys(("table", "streams", "update", "counters", "rows"), "*i64")
    | dict.fromkeys(("runs", "go", "words"), "*i32")
    | dict.fromkeys(("coeffs", "restore", "curvature", "decay", "smoothing", "reals", "hessian"), "*fp32")
    | dict.fromkeys(("digits", "src", "dst", "residual"), "*i8")
    | dict.fromkeys(("n", "n_tensors", "n_streams", "n_terms", "n_steps", "n_tiles", "rank"), "i32")
    | dict.fromkeys(("domain", "moves", "decays", "updates", "moments"), "i32")
    | dict.fromkeys(("k0", "k1", "tensor_id", "number"), "u32")
    | dict.fromkeys(("first", "skip", "width", "offset", "plane", "row_word", "column_word"), "i64")
    | dict.fromkeys(("row_scale", "column_scale", "columns"), "i64")
    | dict.fromkeys(("hessian_min", "hessian_max", "root"), "fp32")
)


@dataclass(frozen=True)
class Kernel:
    """A compiled function, the warps of a program, and its compile-time arguments in every call that can be made."""

    function: Any
    warps: int
    forms: Callable[[], Iterable[dict[str, Any]]]
    names: tuple[str, ...]  # of its arguments, in order
    constants: tuple[str, ...]  # of those that are known when it is compiled, and choose the form


KERNELS: dict[str, Kernel] = {}


def kernel(warps: int, forms: Callable[[], Iterable[dict[str, Any]]] = lambda: [{}]) -> Callable[[Any], Any]:
    """``triton.jit`` for a function that ``launch`` can launch; its parameters are named in TYPES or are ``constexpr``.

    Left to itself Triton compiles anew where an integer is 1, where 16 divides an integer or an address, and where an
    integer needs 64 bits. Here no value of an argument does that: one form is compiled once.
    """

    def declare(function: Any) -> Any:
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        values = [n for n in names if n not in function.__annotations__]
        constants = tuple(n for n in names if n not in values)
        function.__annotations__ |= {n: TYPES[n] for n in values}
        compiled = triton.jit(function, do_not_specialize=values)
        KERNELS[function.__name__] = Kernel(compiled, warps, forms, names, constants)
        return compiled

    return declare


def options(warps: int) -> dict[str, Any]:
    """Options of a compilation. Fused multiply-add is asked for because Triton's default is about to change."""
    if triton.knobs.runtime.interpret:
        return {}
    return {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}


def launch(function: Any, programs: int, **arguments: Any) -> None:
    """Launch a declared kernel. No other place does, so that KERNELS names all that can be compiled.

    What Triton does at each launch to find the compiled form takes the host longer than many a pass takes the GPU, so
    a form that was launched before is called directly.
    """
    kernel = KERNELS[function.__name__]
    device = None if triton.knobs.runtime.interpret else driver.active.get_current_device()
    form = (function.__name__, device, *(arguments[name] for name in kernel.constants))
    if (compiled := _compiled.get(form)) is not None:
        compiled[programs, 1, 1](*(arguments[name] for name in kernel.names))
        return
    with nullcontext() if form in _compiled else _announced_if_it_compiles():
        _compiled[form] = function[(programs,)](**arguments, **options(kernel.warps))  # None in the interpreter


_compiled: dict[tuple[Any, ...], Any] = {}  # by kernel, device and compile-time arguments


# ---- the line that says why the first launch of a form takes long --------------------------------------------------

PATIENCE = 1.0  # seconds; a form that is kept in the cache folder is loaded in a small part of that
_announced = triton.knobs.runtime.interpret  # the interpreter compiles nothing


def announce(what: str) -> None:
    """Write a line to stderr that says what is compiled, and where it is kept."""
    sys.stderr.write(
        f"zo_core: {what} the first time on this machine, which may take a minute (kept in {triton.knobs.cache.dir})\n"
    )


@contextmanager
def announced() -> Iterator[None]:
    """A block whose compilations have been announced, and need no line of their own."""
    global _announced
    before, _announced = _announced, True
    try:
        yield
    finally:
        _announced = before


@contextmanager
def _announced_if_it_compiles() -> Iterator[None]:
    """Say once a process that kernels are compiled, should the launch in this block take longer than PATIENCE."""

    def say() -> None:
        global _announced
        if not _announced:
            _announced = True
            announce("compiling kernels that this process needs")

    timer = None if _announced else threading.Timer(PATIENCE, say)
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which may be another one than that of the tensors: make it theirs."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# ---- what device functions ask about the target -------------------------------------------------------------------

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)


def assembly(_semantic: Any = None) -> tl.constexpr:
    """Whether the code is for an NVIDIA GPU, which runs the PTX assembly. AMD GPUs and the interpreter take Triton's own operations."""
    return tl.constexpr(_semantic is not None and _semantic.builder.options.backend_name == "cuda")


assembly.__triton_builtin__ = not triton.knobs.runtime.interpret  # type: ignore[attr-defined] # Triton gives _semantic to its builtins
