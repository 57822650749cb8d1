"""Compiled forms of the kernels: how many this process has used, how many are kept for later ones, and where.

Triton compiles a kernel anew for each set of compile-time arguments (forms.py); such a form is kept in memory and in
Triton's cache folder.
"""

from pathlib import Path

import triton

from .launch import KERNELS


def used() -> dict[str, int]:
    """Of each kernel, the forms that this process has loaded or compiled; none in the interpreter, which compiles nothing."""
    caches = {name: getattr(kernel.function, "device_caches", {}) for name, kernel in KERNELS.items()}
    return {name: sum(len(cache[0]) for cache in of.values()) for name, of in caches.items()}


def folder() -> Path:
    """Where Triton keeps compiled forms: ``TRITON_CACHE_DIR``, or a folder in the user's home."""
    return Path(triton.knobs.cache.dir)


def kept() -> int:
    """Forms in that folder, of all GPUs and versions."""
    return sum(1 for name in KERNELS for _ in folder().glob(f"*/{name}.json"))
