"""A driver for Triton whose launches are emulated: everything before them is Triton's own, for a GPU that need not be there.

``kernel[grid](...)`` binds, specialises on alignment and on 1, compiles down to a cubin with ptxas and looks up its caches as
on a GPU of the driver's compute capability; then its PTX runs on the CPU tensors that it was given, in place.
"""

from contextlib import contextmanager
from itertools import count

import numpy as np
import torch
import triton
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as active_driver

from . import machine
from .memory import GlobalMemory
from .parser import PTXError

# Bytes of shared memory that a program may have
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}
RUBBISH = 0xA5A5A5A5A5A5A5A5
# Triton before 3.9 shuffles registers that only some lanes have loaded, and the others' values are of no account: there such
# registers hold rubbish, where otherwise reading one is an error.
UNDEFINED = RUBBISH if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9) else None


_numbers = count()


class Emulator:
    """The driver, and what an emulated GPU has seen.

    ``launches`` counts launches by kernel; ``forms`` holds the compiled forms that ran, by Triton's hash of each; ``error`` is the
    share, from -1 to 1, of the error that the PTX ISA allows which every approximate instruction makes.
    """

    def __init__(self, capability):
        if capability not in SHARED:
            raise ValueError(f"capability: expected one of {', '.join(map(str, SHARED))}, got {capability}")
        self.capability, self.error = capability, 0.0
        self.number = next(_numbers)  # kernels keep what they have compiled under it
        self.launches, self.forms = {}, {}
        self._memory, self._kept = None, []
        self.launcher_cls, self.utils = _Launcher, self  # names that Triton asks a driver for

    # -- what Triton asks of a driver

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.number

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_properties(self, device):
        return {"max_shared_mem": SHARED[self.capability], "multiprocessor_count": 108, "warpSize": 32}

    def load_binary(self, name, cubin, shared, device):
        """Module (none that would have to be unloaded), function, registers, spills and the most threads of a program."""
        return None, self._starting, 0, 0, 1024

    def _starts(self, module, function, name, files, hash):  # noqa: A002
        """Triton's hook before a kernel is loaded, which knows the files that were compiled."""
        self._starting = hash, name, next(path for file, path in files.items() if file.endswith(".ptx"))

    # -- launches

    @property
    def in_call(self):
        return self._memory is not None

    def kernel(self, function):
        key, name, path = function
        if (key, self.error) not in self.forms:
            with open(path) as f:
                self.forms[key, self.error] = machine.load(f.read(), name, self.error)
        return self.forms[key, self.error]

    @contextmanager
    def call(self, readable=(), writable=()):
        """Launches that share memory: these tensors, and what ``torch.empty`` makes inside, which holds rubbish at first.

        Tensors that a launch is given besides are read only. Outside of this, they are all that a launch knows, and writable.
        """
        if self._memory is not None:
            raise RuntimeError("calls do not nest")
        self._memory = GlobalMemory()
        try:
            for tensors, may_write in ((readable, False), (writable, True)):
                for name, t in tensors:
                    self._register(self._memory, t, name, may_write)
            with _Empty(self):
                yield
        finally:
            self._memory = None
            self._kept.clear()

    def _register(self, memory, t, name, writable, fresh=False):
        if t.numel():
            last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
            memory.register(t.data_ptr(), (last + 1) * t.element_size(), name, writable, fresh)
            self._kept.append(t)  # its address is not used again

    def launch(self, function, names, kinds, values, grid, metadata):
        kernel, bits = self.kernel(function), []
        memory = GlobalMemory() if self._memory is None else self._memory
        for name, kind, value in zip(names, kinds, values, strict=True):
            if isinstance(value, torch.Tensor):
                self._register(memory, value, name, self._memory is None)
                bits.append(value.data_ptr())
            elif kind == "fp32":
                bits.append(int(np.float32(value).view(np.uint32)))
            elif kind[0] in "iu" and isinstance(value, int):
                bits.append(value)
            elif kind != "constexpr":
                raise TypeError(f"{name}: cannot pass {type(value).__name__} as {kind}")
        if metadata.num_warps * 32 != kernel.threads:
            raise PTXError(
                f"{kernel.name}: compiled for {kernel.threads} threads, launched with {metadata.num_warps * 32}"
            )
        bits += [0] * (len(kernel.parameters) - len(bits))  # pointers to scratch memory, of which there is none
        self.launches[kernel.name] = self.launches.get(kernel.name, 0) + 1
        machine.launch(kernel, memory, bits, grid, metadata.shared, UNDEFINED)


class _Launcher:
    """Called by Triton with the grid and the bound arguments of each launch."""

    def __init__(self, src, metadata):
        self.names, self.kinds, self.metadata = list(src.signature), list(src.signature.values()), metadata

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *values):
        active_driver.active.launch(function, self.names, self.kinds, values, (x, y, z), self.metadata)


class _Empty(TorchFunctionMode):
    """``torch.empty`` of a launcher: known memory, full of rubbish, that must not be read before it is written."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if getattr(function, "__name__", "") in ("empty", "empty_like", "new_empty") and out.numel():
            out.view(-1).view(torch.uint8).fill_(RUBBISH & 0xFF)
            self.gpu._register(self.gpu._memory, out, "torch.empty", True, fresh=True)
        return out


def install(capability):
    """Make an emulated GPU Triton's device from here on; gives the ``Emulator``."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, with which kernels are interpreted and never compiled: unset it")
    gpu = Emulator(capability)
    active_driver.set_active(gpu)
    hook = triton.knobs.runtime.kernel_load_start_hook
    hook.calls[:] = [c for c in hook.calls if getattr(c, "__func__", None) is not Emulator._starts]
    hook.add(gpu._starts)
    return gpu


@contextmanager
def emulated(capability):
    """The same for a ``with`` block; then the device that was before."""
    before = active_driver._active
    gpu = install(capability)
    try:
        yield gpu
    finally:
        hook = triton.knobs.runtime.kernel_load_start_hook
        hook.remove(gpu._starts)
        if isinstance(before, Emulator):
            hook.add(before._starts)
        active_driver._active = before
