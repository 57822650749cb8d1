"""Finds the native CPU library, loads it through ctypes and hands tensors to its C ABI (include/zo_core.h)."""

import ctypes
import os
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels import reference
from ..kernels.reference import HESSIAN_RANGE, ROUNDS

ABI_VERSION = 7
LIBRARY = Path(__file__).with_name("libzo_core.so")
CHOICE = os.environ.get("ZO_CORE_BACKEND", "")  # read once, when the library is imported
ISAS = ("portable", "avx2", "avx512")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FIELDS = 12  # int64 of a zo_tensor
DISTRIBUTIONS = {"gaussian": 0, "rademacher": 1, "factored": 2}

_i32, _i64, _u32, _u64, _f32, _ptr = (
    ctypes.c_int32,
    ctypes.c_int64,
    ctypes.c_uint32,
    ctypes.c_uint64,
    ctypes.c_float,
    ctypes.c_void_p,
)


class _PassStruct(ctypes.Structure):
    _fields_ = (
        ("seed", _u64),
        ("streams", _ptr),
        ("coeffs", _ptr),
        ("restore", _ptr),
        ("curvature", _ptr),
        ("decay", _ptr),
        ("smoothing", _ptr),
        ("squares", _ptr),
        ("n_streams", _i64),
        ("hessian_min", _f32),
        ("hessian_max", _f32),
        ("distribution", _i32),
        ("rounding", _i32),
        ("update", _u32),
        ("threads", _i32),
        ("rank", _i32),
    )


def _load() -> tuple[ctypes.CDLL | None, str]:
    if CHOICE not in ("", "triton", "reference"):
        raise ValueError(
            f"ZO_CORE_BACKEND: expected triton (CUDA tensors take the Triton kernels or raise an error), reference (all tensors "
            f"take the slow torch reference) or nothing (each device takes the fastest that is there), got {CHOICE!r}"
        )
    if CHOICE == "reference":
        return None, "switched off by ZO_CORE_BACKEND=reference"
    if not LIBRARY.exists():
        return None, (
            "not built: install g++ (or clang++) and ninja, then reinstall zo_core, or run "
            "`python setup.py build_ext --inplace` in a checkout"
        )
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return None, f"{LIBRARY.name} could not be loaded ({error}): rebuild it on this machine"
    if (found := library.zo_abi_version()) != ABI_VERSION:
        return None, f"{LIBRARY.name} has ABI version {found}, this package needs {ABI_VERSION}: rebuild it"
    library.zo_run.argtypes = (ctypes.POINTER(_PassStruct), _ptr, _i64, _ptr)
    library.zo_run_steps.argtypes = (ctypes.POINTER(_PassStruct), _i64, _ptr, _i64, _ptr)
    library.zo_signs.argtypes = (_u64, _u32, _u32, _ptr, _i64, _i32, _i64, _ptr)
    library.zo_philox.argtypes = (_u64, _u32, _u32, _u32, _u64, _i64, _i32, _ptr)
    if (isa := os.environ.get("ZO_CORE_ISA")) and (isa not in ISAS or library.zo_isa_set(ISAS.index(isa))):
        choices = ", ".join(name for i, name in enumerate(ISAS) if library.zo_isa_available(i))
        raise ValueError(f"ZO_CORE_ISA={isa}: expected one this machine runs ({choices})")
    return library, ""


_library, why_missing = _load()


def available() -> bool:
    """Whether the native library is loaded; ``why_missing`` says what to do if not."""
    return _library is not None


def _require() -> ctypes.CDLL:
    if _library is None:
        raise RuntimeError(f"zo_core's native CPU library is {why_missing}")
    return _library


def isas() -> tuple[str, ...]:
    """Instruction sets that are compiled in and that this processor runs, slowest first."""
    return tuple(name for i, name in enumerate(ISAS) if _library is not None and _library.zo_isa_available(i))


def get_isa() -> str:
    """The instruction set in use. Raises RuntimeError without the native library."""
    return ISAS[_require().zo_isa_get()]


def set_isa(name: str) -> None:
    """Choose the instruction set for the whole process; ValueError if it is not one of ``isas()``."""
    if name not in isas():
        raise ValueError(f"isa: expected one of {isas()}, got {name!r}")
    _require().zo_isa_set(ISAS.index(name))


def philox_(
    words: Tensor, *, domain: int, tensor_id: int, stream: int, block: int, seed: int, rounds: int = ROUNDS
) -> None:
    """Fill int32 ``words`` of shape (n, 4) with the Philox words of blocks ``block`` to ``block + n - 1``."""
    if _require().zo_philox(seed, domain, tensor_id, stream, block, words.shape[0], rounds, words.data_ptr()):
        raise RuntimeError("zo_philox refused its arguments: please report this as a bug")


def signs_(signs: Tensor, streams: Tensor, *, domain: int, tensor_id: int, seed: int) -> None:
    """Fill float32 ``signs`` of shape (K, rank, n) with those of indices 0 to n - 1: of stream k and factor q at [k, q]."""
    (k, rank, n), numbers = signs.shape, streams.to(torch.int32).contiguous()
    if _require().zo_signs(seed, domain, tensor_id, numbers.data_ptr(), k, rank, n, signs.data_ptr()):
        raise RuntimeError("zo_signs refused its arguments: please report this as a bug")


def prepare(
    src: Sequence[Tensor],
    dst: Sequence[Tensor],
    hessians: Sequence[Tensor],
    tensor_ids: Sequence[int],
    offsets: Sequence[int],
    *,
    residuals: Sequence[Tensor] = (),
    row_scales: Sequence[Tensor] = (),
    column_scales: Sequence[Tensor] = (),
    columns: Sequence[int] = (),
) -> Callable[..., None]:
    """``zo_run`` on CPU tensors, as a function of the scalars of ``bindings.ops``, already checked.

    It keeps no tensor alive: they are to stay where they are for as long as it is called.
    """
    table = _table(src, dst, hessians, tensor_ids, offsets, residuals, row_scales, column_scales, columns)
    n = len(src)
    return lambda **scalars: _run(table.buffer_info()[0], n, **scalars)


def run_pass(
    src: Sequence[Tensor], dst: Sequence[Tensor], hessians: Sequence[Tensor], tensor_ids: Sequence[int],
    offsets: Sequence[int], streams: Tensor, coeffs: Tensor, *, residuals: Sequence[Tensor] = (),
    row_scales: Sequence[Tensor] = (), column_scales: Sequence[Tensor] = (), columns: Sequence[int] = (), **scalars: Any,
) -> None:  # fmt: skip
    """``zo_run`` on CPU tensors; arguments as in ``bindings.ops``, already checked."""
    beside: dict[str, Any] = {"residuals": residuals, "row_scales": row_scales, "column_scales": column_scales}
    run = prepare(src, dst, hessians, tensor_ids, offsets, columns=columns, **beside)
    run(streams=streams, coeffs=coeffs, **scalars)


def run_steps(
    weights: Sequence[Tensor], tensor_ids: Sequence[int], offsets: Sequence[int], streams: Tensor, coeffs: Tensor, *,
    seed: int, distribution: str, counters: Tensor, decay: Tensor | None = None, updates: Tensor | None = None,
    residuals: Sequence[Tensor] = (), rank: int = 1, columns: Sequence[int] = (),
) -> None:  # fmt: skip
    """``zo_run_steps`` on CPU tensors; arguments as ``replay_`` in ``bindings.ops``, already checked."""
    streams, coeffs = streams.to(torch.int32).contiguous(), coeffs.contiguous()
    decay = decay.contiguous() if decay is not None else None
    rounding = updates.tolist() if updates is not None else [0] * len(streams)
    jobs = (_PassStruct * len(streams))()
    for s, job in enumerate(jobs):
        job.seed, job.n_streams, job.threads = seed, streams.shape[1], torch.get_num_threads()
        job.streams, job.coeffs = streams[s].data_ptr(), coeffs[s].data_ptr()
        job.decay = decay[s].data_ptr() if decay is not None else None
        job.distribution, job.rounding = DISTRIBUTIONS[distribution], updates is not None
        job.update, job.rank = rounding[s] & 0xFFFFFFFF, rank
    table = _table(weights, weights, (), tensor_ids, offsets, residuals, columns=columns)
    address, count = table.buffer_info()[0], len(weights)
    if status := _require().zo_run_steps(jobs, len(jobs), address, count, counters.data_ptr()):
        raise RuntimeError(f"zo_run_steps refused its arguments (status {status}): please report this as a bug")


def _table(
    src: Sequence[Tensor], dst: Sequence[Tensor], hessians: Sequence[Tensor], tensor_ids: Sequence[int],
    offsets: Sequence[int], residuals: Sequence[Tensor], row_scales: Sequence[Tensor] = (),
    column_scales: Sequence[Tensor] = (), columns: Sequence[int] = (),
) -> "array[int]":  # fmt: skip
    """``zo_tensor`` structs, one a tensor: _FIELDS int64, [6] and [7] pairs of 32-bit fields."""
    kept_bits = [8 * r.itemsize if r.numel() else 0 for r in residuals] if residuals else [0] * len(src)
    fields = [
        [t.data_ptr() for t in src], [t.data_ptr() for t in dst], [h.data_ptr() for h in hessians],
        [r.data_ptr() if bits else 0 for r, bits in zip(residuals, kept_bits, strict=False)],
        [t.numel() for t in src], offsets,
        [i | DTYPES[t.dtype] << 32 for i, t in zip(tensor_ids, src, strict=True)],
        [DTYPES[t.dtype] | bits << 32 for t, bits in zip(dst, kept_bits, strict=True)],
        *(zip(*map(_factors, row_scales, column_scales), strict=True) if row_scales else ((), (), ())),
        columns or reference.columns_of(src),
    ]  # fmt: skip
    table = array("q", bytes(8 * _FIELDS * len(src)))
    for i, field in enumerate(fields):
        if field:
            table[i::_FIELDS] = array("q", field)
    return table


def _factors(row_scale: Tensor, column_scale: Tensor) -> tuple[int, int, int]:
    """Fields 8 to 10 of a ``zo_tensor``: the two factors and the number of columns. A vector is one row."""
    if not column_scale.numel():
        return 0, row_scale.data_ptr(), row_scale.numel()
    return row_scale.data_ptr(), column_scale.data_ptr(), column_scale.numel()


def run_rows(
    src: Tensor, rows: Tensor, dst: Tensor, tensor_id: int, offset: int, streams: Tensor, coeffs: Tensor, *, seed: int,
    distribution: str, counters: Tensor, residual: Tensor | None = None, hessian: Tensor | None = None,
    row_scale: Tensor | None = None, column_scale: Tensor | None = None, rank: int = 1,
) -> None:  # fmt: skip
    """``perturb`` with a tensor a row: rows of ``src`` that ``rows`` names, into the rows of ``dst``."""
    n, width = dst.shape
    bits = 8 * residual.itemsize if residual is not None and residual.numel() else 0
    read = [
        (t.data_ptr(), width * t.itemsize) if t is not None and t.numel() else (0, 0) for t in (src, hessian, residual)
    ]
    factors = _factors(row_scale, column_scale) if row_scale is not None and column_scale is not None else (0, 0, 0)
    kinds = (tensor_id | DTYPES[src.dtype] << 32, DTYPES[dst.dtype] | bits << 32)
    first = (read[0][0], dst.data_ptr(), read[1][0], read[2][0], width, offset, *kinds, *factors, width)
    a_row = (read[0][1], 0, read[1][1], read[2][1], 0, width, 0, 0, 0, 0, 0, 0)
    table = torch.tensor(first) + rows.unsqueeze(1) * torch.tensor(a_row)
    table[:, 1] += torch.arange(n) * (width * dst.itemsize)
    counts = counters.new_zeros(1 + n)
    _run(table.data_ptr(), n, streams, coeffs.expand(-1, n), seed, distribution, counts, rank=rank)
    counters += torch.stack((counts[0], counts[1:].sum()))


def _run(
    table: int, n: int, streams: Tensor, coeffs: Tensor, seed: int, distribution: str, counters: Tensor,
    decay: Tensor | None = None, update: Tensor | None = None, restore: Tensor | None = None,
    curvature: Tensor | None = None, smoothing: Tensor | None = None, squares: Tensor | None = None,
    hessian_min: float = HESSIAN_RANGE[0], hessian_max: float = HESSIAN_RANGE[1], rank: int = 1,
) -> None:  # fmt: skip
    """``zo_run`` on n ``zo_tensor`` structs at this address."""
    kept: list[Tensor] = []  # alive until the call returns

    def pointer(x: Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
        if x is None:
            return None
        kept.append(x.to(dtype).contiguous())
        return kept[-1].data_ptr()

    job = _PassStruct(
        seed=seed,
        streams=pointer(streams, torch.int32),
        coeffs=pointer(coeffs),
        restore=pointer(restore),
        curvature=pointer(curvature),
        decay=pointer(decay),
        smoothing=pointer(smoothing),
        squares=pointer(squares),
        n_streams=streams.numel(),
        hessian_min=hessian_min,
        hessian_max=hessian_max,
        distribution=DISTRIBUTIONS[distribution],
        rounding=update is not None,
        update=0 if update is None else int(update) & 0xFFFFFFFF,
        threads=torch.get_num_threads(),
        rank=rank,
    )
    if status := _require().zo_run(job, table, n, counters.data_ptr()):
        raise RuntimeError(f"zo_run refused its arguments (status {status}): please report this as a bug")
