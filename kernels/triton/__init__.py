"""The Triton backend (CUDA, or CPU tensors under ``TRITON_INTERPRET=1``). Only this folder imports triton."""

from .noise import philox_
from .passes import run_pass
from .rows import run_rows

__all__ = ["philox_", "run_pass", "run_rows"]
