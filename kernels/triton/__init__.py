"""The Triton backend (CUDA, or CPU tensors under ``TRITON_INTERPRET=1``). Only this folder imports triton."""

import re

import triton

VERSION: str = triton.__version__
OLDEST = (3, 6)  # pyproject.toml says the same; the newest one that was tried is 3.9

if tuple(map(int, re.findall(r"\d+", VERSION)[:2])) < OLDEST:
    raise ImportError(
        f"triton: expected version {OLDEST[0]}.{OLDEST[1]} or newer, got {VERSION}; install a newer torch, which brings "
        "the triton that belongs to it"
    )

from .factored import prepare_signs, signs_
from .noise import philox_
from .passes import prepare, run_pass
from .rows import run_rows

__all__ = ["philox_", "prepare", "prepare_signs", "run_pass", "run_rows", "signs_"]
