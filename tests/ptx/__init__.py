"""zo_core's Triton kernels as compiled, without a GPU: an emulator of PTX under Triton's own launches.

    import ptx
    gpu = ptx.install(90)              # from here on zo_core.kernels.triton runs on CPU tensors, compiled for sm_90
    with ptx.emulated(80) as gpu: ...  # the same for a block

Everything up to the launch is Triton's: binder, specialisation, caches, compiler and ptxas. The launch itself is emulated in
numpy, thread by thread, on the CPU tensors in place. ``ptx.PTXError`` is raised where a kernel does what compute-sanitizer
would report, or has an instruction that the emulator does not know. Kernels must not be interpreted: TRITON_INTERPRET is unset
when triton is imported. ``zo_core.kernels.triton`` is served with the bounds of its tensors; another module with the same
functions after ``ptx.watch(module)``. Any other ``@triton.jit`` kernel knows the tensors
that it is passed. Nothing is routed: call the module, or make ``bindings.ops.backend_for`` return it.

With ZO_CORE_PTX=90 the project's own tests of its backends run so (tests/conftest.py), and ``pytest tests/ptx`` tests the
emulator itself and shows that it finds the faults of ``mutants.py``.

    parser.py      text to instructions           memory.py      buffers, and what a sanitizer checks
    semantics.py   what instructions compute      machine.py     threads, warps, barriers, tensor cores
    driver.py      the driver for Triton          backend.py     what zo_core's calls may read and write
    mutants.py     faults in the kernels, on purpose
"""

from contextlib import contextmanager

from . import driver
from .backend import watch
from .driver import Emulator
from .parser import PTXError

__all__ = ["Emulator", "PTXError", "emulated", "install", "watch"]


def install(capability):
    """Make an emulated GPU of this compute capability Triton's device, for the rest of the process."""
    gpu = driver.install(capability)
    _watch()
    return gpu


@contextmanager
def emulated(capability):
    """The same for a ``with`` block; afterwards the device is the one before."""
    with driver.emulated(capability) as gpu:
        _watch()
        yield gpu


def _watch():
    from zo_core.kernels import triton

    watch(triton)
