"""The Triton backend: ``run_pass``, ``run_rows`` and ``philox_`` on CUDA tensors (or CPU tensors in the interpreter)."""

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

import triton

from ..reference import HESSIAN_RANGE, ROUNDS
from . import passes, sums

_CACHED = 1024  # tables kept: a shadow engine needs one a module; one is 96 bytes a tensor and 8 a run of tiles

_DTYPES = {torch.float32: triton.language.float32, torch.bfloat16: triton.language.bfloat16,
           torch.float16: triton.language.float16}  # fmt: skip
_DISTRIBUTIONS = {"gaussian": 0, "rademacher": 1}


def options(warps: int = passes.WARPS) -> dict[str, Any]:
    """Launch options. Fused multiply-add is said because Triton's default is about to change."""
    if triton.knobs.runtime.interpret:
        return {}
    return {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}


def _int32(x: int) -> int:
    """The int32 with the low 32 bits of x: kernels take these only, one compiled form for all seeds."""
    x &= 0xFFFFFFFF
    return x - (x >> 31 << 32)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Launches go to the current device: make it that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# ---- the device table ---------------------------------------------------------------------------------------------

_Key = tuple[Any, ...]
_tables: OrderedDict[_Key, tuple[Tensor, Tensor]] = OrderedDict()


def tile_rows(
    src: Sequence[int], dst: Sequence[int], hessians: Sequence[int], residuals: Sequence[int], sizes: Sequence[int],
    offsets: Sequence[int], ids: Sequence[int], columns: Sequence[int], src_bytes: int, dst_bytes: int, residual_bits: int,
    factors: Sequence[tuple[int, int, int]] = (),
) -> tuple[list[list[int]], list[tuple[int, int]]]:  # fmt: skip
    """Rows of the table and (row, first tile) of each program, from addresses and element counts; empty ones left out.

    ``factors``: what ``_factors`` makes of the two scales of each tensor, or none.
    """
    rows, runs = [], []
    for s, d, h, r, n, offset, tensor_id, column, (row_scale, column_scale, width) in zip(
        src, dst, hessians, residuals, sizes, offsets, ids, columns, factors or [(0, 0, 0)] * len(src), strict=True
    ):
        if not n:
            continue
        shift = offset % passes.TILE  # addresses are those of the element where the first tile starts
        s, d, h = s - shift * src_bytes, d - shift * dst_bytes, h - shift * 4 if h else 0
        r -= shift * residual_bits // 8
        aligned = s % 16 == d % 16 == h % 16 == r % (residual_bits or 1) == 0  # 8 elements of a residual are its bits
        aligned &= column_scale % 16 == width % 8 == 0
        rows.append([s, d, h, shift, shift + n, offset - shift, tensor_id, column * 2 + aligned, r])
        rows[-1] += [row_scale, column_scale, width]
        tiles = -(-(shift + n) // passes.TILE)
        runs += [(len(rows) - 1, first) for first in range(0, tiles, passes.TILES)]
    return rows, runs


def _factors(row_scale: Tensor, column_scale: Tensor) -> tuple[int, int, int]:
    """Addresses of the two factors and the number of columns. A vector is one row without end, of factor 1, at 0."""
    if not column_scale.numel():
        return 0, row_scale.data_ptr(), 1 << 62
    return row_scale.data_ptr(), column_scale.data_ptr(), column_scale.numel()


def _table(src: list[Tensor], dst: list[Tensor], hessians: list[Tensor], residuals: list[Tensor], offsets: list[int],
           ids: list[int], columns: list[int], device: torch.device,
           factors: Sequence[tuple[int, int, int]] = ()) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The table on the device, made when these tensors are first seen: addresses and sizes are all it depends on."""
    addresses = [[t.data_ptr() for t in tensors] for tensors in (src, dst, hessians, residuals)]
    sizes = [t.numel() for t in src]
    bits = 8 * residuals[0].element_size() if residuals else 0
    kind = (device, src[0].dtype, dst[0].dtype, bits)
    key = (kind, *map(tuple, (*addresses, sizes, offsets, ids, columns, factors)))
    if (found := _tables.get(key)) is not None:
        _tables.move_to_end(key)
        return found
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("zo_core: these tensors are new: run the pass once on them before capturing a CUDA graph")
    rows, runs = tile_rows(
        addresses[0], addresses[1], addresses[2] or [0] * len(src), addresses[3] or [0] * len(src), sizes, offsets, ids,
        columns, src[0].element_size(), dst[0].element_size(), bits, factors,
    )  # fmt: skip
    made = (
        torch.tensor(rows, dtype=torch.int64).view(-1, passes.ROW.value).to(device),
        torch.tensor(runs, dtype=torch.int32).view(-1, 2).to(device),
    )
    _tables[key] = made
    if len(_tables) > _CACHED:
        _tables.popitem(last=False)
    return made


# ---- launches -----------------------------------------------------------------------------------------------------


def philox_(
    words: Tensor, *, domain: int, tensor_id: int, stream: int, block: int, seed: int, rounds: int = ROUNDS
) -> None:
    """Fill int32 ``words`` of shape (n, 4) with the Philox words of blocks ``block`` to ``block + n - 1``."""
    if n := words.shape[0]:
        key = map(_int32, (tensor_id, stream, seed, seed >> 32))
        # 256 blocks a program from a multiple of 256: block numbers never carry inside one
        first = block - block % 256
        with _on(words.device):
            passes.philox_kernel[(triton.cdiv(block + n - first, 256),)](
                words, n, first, block - first, *key, domain, rounds, 256, **options(4)
            )


def _digits(coeffs: Tensor, none: Tensor, summed: bool) -> tuple[Tensor, Tensor, Tensor, int]:
    """What the sums of signs read in place of (K, T) coefficients (sums.py)."""
    k, count = coeffs.shape
    steps = -(-k // 8)
    if not summed:
        return none, none, none, steps
    digits = torch.empty(count * steps * 512, dtype=torch.int8, device=coeffs.device)
    totals = torch.empty(count * 16, dtype=torch.int32, device=coeffs.device)
    scales = torch.empty(count, dtype=torch.float32, device=coeffs.device)
    sums.digits_kernel[(count,)](coeffs, digits, totals, scales, count, k, steps, **options(1))
    return digits, totals, scales, steps


def _run_pass(
    src: Sequence[Tensor],
    dst: Sequence[Tensor],
    hessians: Sequence[Tensor],
    tensor_ids: Sequence[int],
    offsets: Sequence[int],
    streams: Tensor,
    coeffs: Tensor,
    *,
    seed: int,
    distribution: str,
    counters: Tensor,
    decay: Tensor | None = None,
    update: Tensor | None = None,
    restore: Tensor | None = None,
    curvature: Tensor | None = None,
    smoothing: Tensor | None = None,
    hessian_min: float = HESSIAN_RANGE[0],
    hessian_max: float = HESSIAN_RANGE[1],
    residuals: Sequence[Tensor] = (),
    row_scales: Sequence[Tensor] = (),
    column_scales: Sequence[Tensor] = (),
) -> None:
    """The pass of ``bindings.ops``, one launch a kind of tensor after a small one that looks at the scalars."""
    if not src:
        return
    count, device = len(src), streams.device
    coeffs = coeffs.contiguous()
    restore, curvature, decay, smoothing = (
        None if x is None else x.contiguous() for x in (restore, curvature, decay, smoothing)
    )
    go = torch.empty(1 + count, dtype=torch.int32, device=device)
    none = counters  # stands where a form of the kernel reads nothing
    moves = any(s.data_ptr() != d.data_ptr() for s, d in zip(src, dst, strict=True))
    passes.gate_kernel[(1,)](
        coeffs, none if restore is None else restore, none if curvature is None else curvature,
        none if decay is None else decay, none if smoothing is None else smoothing, go, counters, count,
        streams.numel(), moves, decay is not None, curvature is not None, 512, **options(4),
    )  # fmt: skip
    form = 3 if row_scales else 2 if curvature is not None else int(bool(hessians))  # as passes.py numbers them
    summed = passes.use_sums(_DISTRIBUTIONS[distribution], form, streams.numel())
    digits, totals, scales, n_steps = _digits(coeffs, none, summed)
    groups: dict[tuple[torch.dtype, torch.dtype, int], list[int]] = {}
    for i, (s, d) in enumerate(zip(src, dst, strict=True)):
        bits = 8 * residuals[i].element_size() if residuals and residuals[i].numel() else 0
        groups.setdefault((s.dtype, d.dtype, bits), []).append(i)
    for (src_dtype, dst_dtype, bits), members in groups.items():
        table, runs = _table(
            [src[i] for i in members],
            [dst[i] for i in members],
            [hessians[i] for i in members] if hessians else [],
            [residuals[i] for i in members] if bits else [],
            [offsets[i] if offsets else 0 for i in members],
            [tensor_ids[i] for i in members],
            members,
            device,
            [_factors(row_scales[i], column_scales[i]) for i in members] if row_scales else (),
        )
        if not len(runs):
            continue
        passes.pass_kernel[(len(runs),)](
            table, runs, go, streams, digits, totals, scales, n_steps, coeffs, none if restore is None else restore,
            none if curvature is None else curvature, none if decay is None else decay,
            none if smoothing is None else smoothing, none if update is None else update, counters,
            _int32(seed), _int32(seed >> 32), count, streams.numel(), hessian_min, min(hessian_max, 3.4e38),
            **passes.constants(
                _DTYPES[src_dtype], _DTYPES[dst_dtype], _DISTRIBUTIONS[distribution],
                form, update is not None, decay is not None, streams.numel(), bits, not moves,
            ),
            **options(),
        )  # fmt: skip


def _run_rows(
    src: Tensor, rows: Tensor, dst: Tensor, tensor_id: int, offset: int, streams: Tensor, coeffs: Tensor, *, seed: int,
    distribution: str, counters: Tensor, residual: Tensor | None = None, hessian: Tensor | None = None,
    row_scale: Tensor | None = None, column_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """``perturb_rows`` of ``bindings.ops``: rows of ``src`` that ``rows`` names, into the rows of ``dst``."""
    if not dst.numel():
        return
    coeffs = coeffs.contiguous()
    go, k, none = torch.empty(2, dtype=torch.int32, device=src.device), streams.numel(), counters
    passes.gate_kernel[(1,)](coeffs, none, none, none, none, go, counters, 1, k, True, False, False, 512, **options(4))
    form = 3 if row_scale is not None else int(hessian is not None)
    summed = passes.use_sums(_DISTRIBUTIONS[distribution], form, k)
    digits, totals, scales, steps = _digits(coeffs, none, summed)
    width = src.shape[1]
    tiles = -(-width // passes.TILE) + 1  # a row may start anywhere in its first tile
    bits = 8 * residual.element_size() if residual is not None and residual.numel() else 0
    factors = (0, 0, 0) if row_scale is None or column_scale is None else _factors(row_scale, column_scale)
    passes.rows_kernel[(rows.numel() * tiles,)](
        src, rows, dst, residual if bits else none, none if hessian is None else hessian, *factors, go, streams, digits,
        totals, scales, coeffs, counters, tiles, width, _int32(tensor_id), offset, _int32(seed), _int32(seed >> 32), k,
        steps, _DISTRIBUTIONS[distribution], form, bits, k == 1, summed, passes.TILE, **options(),
    )  # fmt: skip


def run_pass(*args: Any, counters: Tensor, **options: Any) -> None:
    """The pass of ``bindings.ops``, arguments already checked: one launch a kind of tensor, and two small ones before."""
    with _on(counters.device):
        _run_pass(*args, counters=counters, **options)


def run_rows(*args: Any, **options: Any) -> None:
    """``perturb_rows`` of ``bindings.ops``, arguments already checked."""
    with _on(args[0].device):
        _run_rows(*args, **options)
