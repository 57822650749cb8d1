"""The operation on numpy arrays, in their own memory: for hosts that keep weights outside torch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .bindings import ops

_DTYPES = ("float32", "float16", "bfloat16")


def perturb_(
    array: "np.ndarray[Any, Any]",
    streams: int | Sequence[int],
    coeffs: float | Sequence[float],
    *,
    seed: int,
    tensor_id: int = 0,
    offset: int = 0,
    distribution: str = "gaussian",
    rank: int = 1,
    columns: int | None = None,
    decay: float = 0.0,
    update: int | None = None,
) -> int:
    """Array <- round((1 - decay) array + sum_k coeffs[k] z(streams[k])), in place and without a copy.

    Args:
        array: float32, float16, or bfloat16 of ml_dtypes; C-contiguous, writable, of any shape. A slice of a larger tensor
            gets that tensor's noise with its ``offset``.
        streams: numbers of the K probes, taken modulo 2^32, or the one.
        coeffs: K finite numbers, or the one.
        seed: 64-bit run seed.
        tensor_id: id of the tensor in the noise.
        offset: index of the array's first element in the full tensor.
        distribution: "gaussian", "rademacher" or "factored".
        rank: of factored noise.
        columns: the full tensor's last dimension, 0 of a vector, for factored noise; None: as the array's shape says. A
            flat slice of a matrix needs it.
        decay: what is taken off the array, as a fraction.
        update: stream of the stochastic rounding of 16-bit results; None rounds to nearest.

    Returns:
        How many elements went beyond the range of their dtype and were set to its largest value.

    Raises:
        TypeError, ValueError: an argument is not as described; nothing has been written.
    """
    if not isinstance(array, np.ndarray) or array.dtype.name not in _DTYPES or not array.dtype.isnative:
        raise TypeError(
            f"array: expected a numpy array of one of {_DTYPES}, got {getattr(array, 'dtype', type(array))}"
        )
    if not (array.flags.c_contiguous and array.flags.writeable):
        raise ValueError("array: expected a writable C-contiguous array; pass numpy.ascontiguousarray(array) or a copy")
    rows = torch.tensor(coeffs, dtype=torch.float32, device="cpu").reshape(-1, 1)
    numbers = torch.tensor(streams, dtype=torch.int64, device="cpu").reshape(-1)
    counters = torch.zeros(2, dtype=torch.int64, device="cpu")
    plain = array.view(np.uint16) if array.dtype.name == "bfloat16" else array
    tensor = torch.from_numpy(plain)
    torch.ops.zo_core.update_(
        [tensor.view(torch.bfloat16) if plain is not array else tensor], [], [tensor_id], [offset], numbers, rows,
        seed=ops.signed64(seed), distribution=distribution, counters=counters, rank=rank,
        columns=None if columns is None else [columns],
        decay=torch.tensor([decay], dtype=torch.float32, device="cpu"),
        update=None if update is None else torch.tensor([update], device="cpu"),
    )  # fmt: skip
    if counters[0]:
        raise ValueError(f"coeffs, decay: expected finite numbers, got {coeffs} and {decay}")
    return int(counters[1])
