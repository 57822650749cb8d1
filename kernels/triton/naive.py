"""The baseline of bench/gpu.py: what one writes first, ``tl.randn`` element by element, one launch a tensor."""

import torch

import triton
import triton.language as tl

from .launch import options


@triton.jit(do_not_specialize=["seed"])
def _naive_kernel(weights, n, seed, c, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    w = tl.load(weights + at, mask=mask).to(tl.float32)
    tl.store(weights + at, (w + c * tl.randn(seed, at)).to(weights.dtype.element_ty), mask=mask)


def naive_add_noise_(weights: list[torch.Tensor], seed: int, c: float) -> None:
    """Weights += c * normal noise."""
    for i, w in enumerate(weights):
        _naive_kernel[(triton.cdiv(w.numel(), 1024),)](w, w.numel(), seed + i, c, 1024, **options(4))
