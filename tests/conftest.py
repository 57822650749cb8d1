"""Shared fixtures: the CPU backends, one a parameter, poisoned memory, and hypothesis without deadlines (machines differ)."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import pytest
import torch
from hypothesis import settings
from zo_core.bindings import native
from zo_core.kernels import reference

settings.register_profile("zo_core", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("zo_core")

NATIVE = native.isas() or ("none",)


@contextmanager
def on(isa: str) -> Iterator[None]:
    """The native library on one instruction set; skips where there is no library."""
    if not native.available():
        pytest.skip(f"the native library is {native.why_missing}")
    before = native.get_isa()
    native.set_isa(isa)
    try:
        yield
    finally:
        native.set_isa(before)


def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The function, whose tensors hold NaN, or bytes of 0x7F in integers, where they would hold whatever was in memory."""

    @wraps(make)
    def made(*args: object, **kwargs: object) -> torch.Tensor:
        out = make(*args, **kwargs)
        if type(out) is torch.Tensor and out.layout is torch.strided and not out.is_meta and not out.is_quantized:
            values = out.data  # which counts its writes by itself: a new tensor is of version 0
            if out.is_floating_point() or out.is_complex():
                values.fill_(torch.nan)
            else:
                values.fill_(int.from_bytes(b"\x7f" * out.itemsize, "little") if out.dtype != torch.bool else True)
        return out

    return made


@pytest.fixture(scope="session", autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Let every use of memory that nobody has written show: it is NaN, and not the zero that it mostly is by luck."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided"):
            patch.setattr(torch, name, poisoned(getattr(torch, name)))
        for name in ("new_empty", "new_empty_strided"):
            patch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
        yield


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The native library on one instruction set; ask for it with ``@pytest.mark.parametrize("isa", NATIVE, indirect=True)``."""
    with on(request.param):
        yield request.param


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # in a process of its own: triton reads it when imported
EMULATED = os.environ.get("ZO_CORE_PTX")  # a compute capability: the Triton kernels as compiled for it (tests/ptx)
TRITON_ON_CPU = INTERPRETED or bool(EMULATED)


def _patch_once() -> None:
    """Spare Triton's interpreter a third of its time: at each call of a device function it looks through all of triton.language.

    It looks for what to replace by numpy, as it has done at the launch and, for the modules that Triton's own device functions
    know, at the first call of one: later calls find nothing. What it replaces is the same with this and without.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patched = set()

    def call(self: interpreter.InterpretedFunction, *args: object, **kwargs: object) -> object:
        modules = frozenset(m.__name__ for m in (tl, tl.core) if any(v is m for v in self.fn.__globals__.values()))
        if modules not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(modules)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def pytest_configure(config: pytest.Config) -> None:
    if INTERPRETED:
        _patch_once()
    if EMULATED:
        import ptx

        ptx.install(int(EMULATED))


@pytest.fixture(params=["triton"] if TRITON_ON_CPU else ["reference", *NATIVE])
def backend(request: pytest.FixtureRequest) -> Iterator[object]:
    """Every backend that serves CPU tensors in this process: the module with ``run_pass`` and ``philox_``."""
    if TRITON_ON_CPU:
        from zo_core.kernels import triton

        yield triton
        return
    if request.param == "reference":
        yield reference
        return
    with on(request.param):
        yield native
