"""The noise as tensors, for looking at it: a pass makes it in registers and never stores it (docs/noise.md)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .bindings import cuda, native, ops

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
) -> Tensor:
    """Noise of a (part of a) tensor, exactly as a perturbation with coefficient 1 adds it to zeros.

    Args:
        distribution: "gaussian" (standard normal) or "rademacher" (+1 or -1).
        shape: of the result.
        seed: 64-bit run seed.
        tensor_id: position of the tensor in the optimizer's list of trainable tensors.
        stream: number of the probe, modulo 2^32.
        offset: index of the first element in the full, contiguous tensor.
        device: where to make it.

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
    )
    return out


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
