"""The noise as tensors, for looking at it: a pass makes it in registers and never stores it (docs/noise.md)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .bindings import cuda, native, ops
from .kernels.reference import COLUMNS, ROWS

VERSION = 1
HOST_DOMAIN, DATA_ORDER, LAYER_ORDER = 3, 1, 2  # domain of host-side selection, and tensor ids in it


def sample(
    distribution: str,
    shape: int | Sequence[int],
    *,
    seed: int,
    tensor_id: int = 0,
    stream: int = 0,
    offset: int = 0,
    device: torch.device | str = "cpu",
    rank: int = 1,
    columns: int | None = None,
) -> Tensor:
    """Noise of a (part of a) tensor, exactly as a perturbation with coefficient 1 adds it to zeros.

    Args:
        distribution: "gaussian" (standard normal), "rademacher" (+1 or -1) or "factored" (of a matrix, products of signs
            of its rows and signs of its columns).
        shape: of the result.
        seed: 64-bit run seed.
        tensor_id: position of the tensor in the optimizer's list of trainable tensors.
        stream: number of the probe, modulo 2^32.
        offset: index of the first element in the full, contiguous tensor.
        device: where to make it.
        rank: of factored noise, how many products are summed.
        columns: the full tensor's last dimension, 0 of a vector, for factored noise; None: as ``shape`` says.

    Returns:
        float32 tensor of ``shape``.

    Raises:
        ValueError: unknown distribution, or a number out of its range.
    """
    out = torch.zeros(shape, dtype=torch.float32, device=device)
    torch.ops.zo_core.update_(
        [out],
        [],
        [tensor_id],
        [offset],
        torch.tensor([stream], device=device),
        torch.ones(1, 1, dtype=torch.float32, device=device),
        seed=ops.signed64(seed),
        distribution=distribution,
        counters=torch.zeros(2, dtype=torch.int64, device=device),
        rank=rank,
        columns=None if columns is None else [columns],
    )
    return out


def factors(
    shape: Sequence[int], streams: Tensor, *, tensor_id: int, seed: int, rank: int = 1
) -> tuple[Tensor, Tensor]:
    """The signs of which the factored noise of a matrix is made: z_k[i, j] = rank^-1/2 sum_q a[k, q, i] b[k, q, j].

    Args:
        shape: of the full tensor, two dimensions or more; all but the last count its rows.
        streams: numbers of the K probes, int64 (K,), taken modulo 2^32.
        tensor_id: position of the tensor in the optimizer's list of trainable tensors.
        seed: 64-bit run seed.
        rank: how many products are summed.

    Returns:
        a, of shape (K, rank, rows), and b, (K, rank, columns): +1 or -1, float32, on the device of ``streams``.

    Raises:
        ValueError: a vector or scalar, whose noise has no factors; or a number out of its range.
    """
    if len(shape) < 2:
        raise ValueError(f"shape: expected two dimensions or more, got {tuple(shape)}: a vector's noise has no factors")
    ops.check_rank("factored", rank)
    key, found = {"seed": ops.signed64(seed), "tensor_id": tensor_id}, []
    for domain, n in ((ROWS, math.prod(shape[:-1])), (COLUMNS, shape[-1])):
        found.append(torch.empty(len(streams), rank, n, dtype=torch.float32, device=streams.device))
        torch.ops.zo_core.signs_(found[-1], streams, domain=domain, **key)
    return found[0], found[1]


def permutation(n: int, *, seed: int, stream: int, purpose: int = DATA_ORDER) -> Tensor:
    """A random order of 0..n-1 (int64, CPU), a pure function of seed, stream (the epoch, say) and purpose.

    Sorts one Philox block an element (domain 3, tensor id ``purpose``: 1 order of data, 2 of layers), so the order does not
    depend on any global state.
    """
    words = torch.empty(n, 4, dtype=torch.int32, device="cpu")
    key = {"seed": ops.signed64(seed), "domain": HOST_DOMAIN, "tensor_id": purpose, "stream": stream, "block": 0}
    torch.ops.zo_core.philox_(words, **key)
    first, second = (words[:, i].to(torch.int64) & 0xFFFFFFFF for i in (0, 1))
    return (first - (1 << 31) << 32 | second).argsort(stable=True)  # in the order of the unsigned 64-bit numbers


def backend_of(device: torch.device) -> str:
    """Which arithmetic serves tensors on this device: backends with one name make the same bits."""
    backend = ops.backend_for(device)
    if backend is native:  # AVX2 and AVX-512 are one; the portable variant has no fused multiply-add
        return "native portable" if native.get_isa() == "portable" else "native"
    return f"{backend.__name__.rpartition('.')[2]} {device.type}"


def backend_info() -> dict[str, object]:
    """What serves tensors.

    Of the CPU: ``native`` (bool), ``isa`` in use, ``isas`` available, ``threads``, ``why_missing``. Of GPUs: ``cuda``, which backend
    serves each device that a pass has run on.
    """
    return {
        "native": native.available(),
        "isa": native.get_isa() if native.available() else None,
        "isas": list(native.isas()),
        "threads": torch.get_num_threads(),
        "why_missing": native.why_missing,
        "cuda": cuda.chosen(),
    }
