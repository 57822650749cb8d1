"""The Triton backend (CUDA, or CPU tensors under ``TRITON_INTERPRET=1``). Only this folder imports triton."""

from .launch import philox_, run_pass, run_rows

__all__ = ["philox_", "run_pass", "run_rows"]
