"""``torch.ops.zo_core.*``: schemas, checks, fakes and dispatch.

All ops write into tensors they are given. One pass computes, for tensor i and each of its elements,

    dst = round( (1 - decay) * (src + H^-1/2 sum_k restore[k] z_k)  +  H'^-1/2 sum_k coeffs[k] z_k )
    H'  = clamp( H (1 - smoothing + sum_k curvature[k] z_k^2), hessian_min, hessian_max )

``update_`` is it in place. ``perturb`` writes ``dst`` instead and neither restores nor changes H. Without
hessians H = 1. Scales in two factors may take the place of H^-1/2, then only read and without restore, curvature and
smoothing: s(e) = row_scales[i][e // n] * column_scales[i][e % n] for element e of the *full* tensor i, and
n = column_scales[i].numel().

    dst = round( (1 - decay) * src  +  s sum_k coeffs[k] z_k )

So may a second moment of the noise, for ``update_`` with Gaussian noise:

    dst = round( (1 - decay) * src  +  sum_k coeffs[k] z_k / (sqrt(sum_k squares[k] z_k^2) + 1e-5) )

``perturb_rows`` is ``perturb`` of the rows of a matrix that an int64 tensor ``rows`` names (an embedding's
looked-up ones): row j of dst from row rows[j] of src, coefficients float32 (K, 1); rows are not checked. Arguments,
for T tensors and K streams, all on the device of the weights:

    tensor_ids   T ints: the tensors' ids in the noise
    offsets      T ints, or [] for zeros: index of the first element in the full, unsharded tensor
    streams      int64 (K,): stream numbers, taken modulo 2^32
    coeffs       float32 (K, T); a zero leaves the tensor out of that stream at no cost
    decay        float32 (T,), or None for 0
    update       int64, one element: stream of the stochastic rounding of 16-bit results; None rounds to nearest
    hessians     T tensors H, float32, of the shapes of the weights, or []; ``hessian`` of the whole matrix in perturb_rows
    restore, curvature   float32 (K, T); smoothing float32 (T,); given together, with hessians, float32
    squares      float32 (K, T), not negative, or None; without hessians, scales and what comes with them
    seed         64-bit run seed as a signed integer (``signed64``)
    distribution "gaussian", "rademacher" or "factored": of a matrix, sums of products of row and column signs
    rank         of factored noise: how many products; 1 with other distributions
    columns      T ints, or None for those of the tensors' own shapes: the last dimension of each *full* tensor, 0 of a vector
                 or scalar. Factored noise alone reads them: element e is in row e // columns[i] and column e % columns[i]. In
                 perturb_rows they are the columns of ``src``
    counters     int64 (1 + T,): passes that were no-ops because a scalar was not finite; elements of each tensor that
                 saturated. T = 1 in perturb_rows
    residuals    T tensors, or None: what rounding took from bfloat16 and float16 weights (of src), so that the value of
                 an element is weight + residual (docs/noise.md). int8 or int16, of the shape of their weights; an empty
                 one for a tensor that keeps none. update_ reads and writes them, perturb reads them, and so does
                 perturb_rows, which takes one tensor, ``residual``
    row_scales, column_scales   T tensors each, float32, contiguous, of any shape, given together, or None. The rows of n
                 columns must reach the end of the tensor, the last one need not be whole. An empty column_scales[i] is
                 for a vector: row_scales[i] has a number for each element. perturb_rows takes ``row_scale`` and
                 ``column_scale``, by the index in the matrix plus ``offset``

``replay_`` is S times ``update_`` without hessians, one step after the other, to the same bits and counts; the native
backend reads and writes each weight once a call. Streams are int64 (S, K), coeffs float32 (S, K, T), decay (S, T), and
``updates``, int64 (S,), has a stream of the stochastic rounding for each step.

``signs_`` fills ``signs``, float32 (K, rank, n), with the random signs of a domain (docs/noise.md) at indices 0 to n - 1:
those of stream k and factor q are ``signs[k, q]``. Domains 4 and 5 are the rows and columns of factored noise.

Errors (TypeError for dtypes, ValueError for all else) come before anything is written.
"""

from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import increment_version

from ..kernels import reference
from ..kernels.reference import HESSIAN_RANGE, ROUNDS
from . import cuda, native
from .warn import warn

DTYPES = tuple(native.DTYPES)
RESIDUAL_DTYPES = (torch.int8, torch.int16)

_UINT64 = (1 << 64) - 1
_COMMON = (
    "int[] tensor_ids, int[] offsets, Tensor streams, Tensor coeffs, *, int seed, str distribution, "
    "Tensor(z!) counters, Tensor? decay=None, Tensor? update=None"
)
_FACTORED = "int rank=1, int[]? columns=None"
_SCHEMAS = (
    f"update_(Tensor(a!)[] weights, Tensor(b!)[] hessians, {_COMMON}, Tensor? restore=None, Tensor? curvature=None, "
    f"Tensor? smoothing=None, float hessian_min={HESSIAN_RANGE[0]}, float hessian_max={HESSIAN_RANGE[1]}, "
    f"Tensor(c!)[]? residuals=None, Tensor[]? row_scales=None, Tensor[]? column_scales=None, {_FACTORED}, "
    "Tensor? squares=None) -> ()",
    f"perturb(Tensor[] src, Tensor(a!)[] dst, Tensor[] hessians, {_COMMON}, Tensor[]? residuals=None, "
    f"Tensor[]? row_scales=None, Tensor[]? column_scales=None, {_FACTORED}) -> ()",
    "perturb_rows(Tensor src, Tensor rows, Tensor(a!) dst, int tensor_id, int offset, Tensor streams, Tensor coeffs, *, "
    "int seed, str distribution, Tensor(z!) counters, Tensor? residual=None, Tensor? hessian=None, "
    "Tensor? row_scale=None, Tensor? column_scale=None, int rank=1) -> ()",
    "replay_(Tensor(a!)[] weights, int[] tensor_ids, int[] offsets, Tensor streams, Tensor coeffs, *, int seed, "
    "str distribution, Tensor(z!) counters, Tensor? decay=None, Tensor? updates=None, Tensor(b!)[]? residuals=None, "
    f"{_FACTORED}) -> ()",
    f"philox_(Tensor(a!) words, *, int seed, int domain, int tensor_id, int stream, int block, int rounds={ROUNDS}) -> ()",
    "signs_(Tensor(a!) signs, Tensor streams, *, int seed, int domain, int tensor_id) -> ()",
)


def signed64(seed: int) -> int:
    """The int64 with the bits of a seed in [0, 2^64); ValueError outside."""
    if not 0 <= seed <= _UINT64:
        raise ValueError(f"seed: expected an integer in [0, 2^64), got {seed}")
    return seed - (seed >> 63 << 64)


def require_one_device(names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """ValueError, by name, unless the tensors to be trained are on one device: scalars and counters of a pass are on it too."""
    by_device: dict[torch.device, str] = {}
    for name, t in zip(names, tensors, strict=True):
        by_device.setdefault(t.device, name)
    if len(by_device) > 1:
        found = ", ".join(f"{name} on {device}" for device, name in by_device.items())
        raise ValueError(
            f"params: expected all trained tensors on one device, got {found}: load the model without device_map (or with "
            "device_map={'': 0}), train only adapters that are on one device, or give each of several processes a GPU and the "
            "whole model (processes=zo_core.distributed.Parallel())"
        )


def check_rank(distribution: str, rank: int) -> None:
    """ValueError unless noise of this distribution can have this rank."""
    if not 1 <= rank <= reference.MAX_RANK:
        raise ValueError(f"rank: expected an integer from 1 to {reference.MAX_RANK}, got {rank}")
    if distribution != "factored" and rank != 1:
        raise ValueError(
            f"rank: expected 1 with distribution {distribution!r}, got {rank}: only distribution='factored' has a rank"
        )


# ---- checks ----------------------------------------------------------------------------------------------------


def _check_tensors(name: str, tensors: Sequence[Tensor], device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
    for i, t in enumerate(tensors):
        if t.dtype not in dtypes:
            raise TypeError(f"{name}[{i}]: expected {' or '.join(map(str, dtypes))}, got {t.dtype}")
        if t.device != device:
            raise ValueError(
                f"{name}[{i}]: expected device {device} as streams, got {t.device}; make one call a device"
            )
        if not t.is_contiguous():
            raise ValueError(
                f"{name}[{i}]: expected a contiguous tensor, got shape {tuple(t.shape)} with strides {t.stride()}; "
                "noise goes by the index in the contiguous tensor: pass t.contiguous()"
            )


def _check_shapes(name: str, tensors: Sequence[Tensor], like: str, others: Sequence[Tensor]) -> None:
    if len(tensors) != len(others):
        raise ValueError(f"{name}: expected {len(others)} tensors as {like} has, got {len(tensors)}")
    for i, (t, o) in enumerate(zip(tensors, others, strict=True)):
        if t.shape != o.shape:
            raise ValueError(f"{name}[{i}]: expected shape {tuple(o.shape)} as {like}[{i}], got {tuple(t.shape)}")


def _check_ints(name: str, numbers: Sequence[int], count: int, bits: int) -> None:
    if len(numbers) != count:
        raise ValueError(f"{name}: expected {count} integers, one a tensor, got {len(numbers)}")
    if bad := [n for n in numbers if not 0 <= n < 1 << bits]:
        raise ValueError(f"{name}: expected integers in [0, 2^{bits}), got {bad[0]}")


def _check_scalars(
    name: str, x: Tensor, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32
) -> None:
    if x.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name}: expected device {device} as streams, got {x.device}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")


def _check_residuals(
    residuals: Sequence[Tensor], like: str, weights: Sequence[Tensor], device: torch.device
) -> dict[str, Tensor]:
    """The residuals by name, empty ones left out, which say that a tensor keeps none."""
    _check_tensors("residuals", residuals, device, RESIDUAL_DTYPES)
    if len(residuals) != len(weights):
        raise ValueError(f"residuals: expected {len(weights)} tensors as {like} has, got {len(residuals)}")
    kept = {f"residuals[{i}]": (r, w) for i, (r, w) in enumerate(zip(residuals, weights, strict=True)) if r.numel()}
    for name, (r, w) in kept.items():
        if w.dtype == torch.float32:
            raise TypeError(f"{name}: expected an empty tensor, as a float32 weight keeps no residual, got {r.dtype}")
        if r.shape != w.shape:
            raise ValueError(f"{name}: expected shape {tuple(w.shape)} as its weight or none, got {tuple(r.shape)}")
    return {name: r for name, (r, _) in kept.items()}


def _check_scales(
    row_scales: Sequence[Tensor],
    column_scales: Sequence[Tensor],
    like: str,
    weights: Sequence[Tensor],
    offsets: Sequence[int],
    device: torch.device,
) -> dict[str, Tensor]:
    """The factors of the scales by name."""
    for name, factors in (("row_scales", row_scales), ("column_scales", column_scales)):
        _check_tensors(name, factors, device, (torch.float32,))
        if len(factors) != len(weights):
            raise ValueError(f"{name}: expected {len(weights)} tensors as {like} has, got {len(factors)}")
    for i, (rows, columns, w) in enumerate(zip(row_scales, column_scales, weights, strict=True)):
        n, end = columns.numel() or 1, w.numel() and w.numel() + (offsets[i] if offsets else 0)
        if rows.numel() * n < end:
            raise ValueError(
                f"row_scales[{i}]: expected {-(-end // n)} numbers or more, one for each row of {n} of the first {end} "
                f"elements of the full tensor, got {rows.numel()}"
            )
    return {f"row_scales[{i}]": x for i, x in enumerate(row_scales)} | {
        f"column_scales[{i}]": x for i, x in enumerate(column_scales)
    }


def _check_factored(
    distribution: str, rank: int, columns: Sequence[int] | None, weights: Sequence[Tensor], offsets: Sequence[int]
) -> None:
    check_rank(distribution, rank)
    if columns is None and distribution != "factored":
        return
    widths = reference.columns_of(weights) if columns is None else columns
    _check_ints("columns", widths, len(weights), 47)  # 7 bits of an index are in a block, 40 in its number
    for i, (n, w) in enumerate(zip(widths, weights, strict=True)):
        end = w.numel() + (offsets[i] if offsets else 0)
        if n and end > n << 47:
            raise ValueError(f"columns[{i}]: expected at most 2^47 rows, got {-(-end // n)} of {n} elements")


def _check_overlap(written: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    """ValueError if a tensor that is written shares memory with another tensor. Those that are only read may share it."""
    if any(isinstance(t, FakeTensor) or t.is_meta for t in (*written.values(), *read.values())):
        return
    spans = [(t.data_ptr(), t.data_ptr() + t.nbytes, name, name in written) for name, t in (written | read).items()]
    furthest = {True: (0, ""), False: (0, "")}  # end and name, of what is written and of what is only read
    for start, end, name, writes in sorted(s for s in spans if s[0] < s[1]):
        for kind in (True, False) if writes else (True,):
            if start < furthest[kind][0]:
                raise ValueError(
                    f"{furthest[kind][1]} and {name} overlap in memory: pass each element once (tied weights as one "
                    "tensor), and write in place with update_"
                )
        furthest[writes] = max(furthest[writes], (end, name))


def _check_pass(
    src: Sequence[Tensor],
    dst: Sequence[Tensor],
    hessians: Sequence[Tensor],
    tensor_ids: Sequence[int],
    offsets: Sequence[int],
    streams: Tensor,
    coeffs: Tensor,
    *,
    in_place: bool,
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
    residuals: Sequence[Tensor] | None = None,
    row_scales: Sequence[Tensor] | None = None,
    column_scales: Sequence[Tensor] | None = None,
    rank: int = 1,
    columns: Sequence[int] | None = None,
    squares: Tensor | None = None,
) -> None:
    device, count, k = streams.device, len(src), streams.numel()
    read, written = ("weights", "weights") if in_place else ("src", "dst")
    _check_tensors(read, src, device, DTYPES)
    if not in_place:
        _check_tensors(written, dst, device, DTYPES)
        _check_shapes(written, dst, read, src)
    _check_ints("tensor_ids", tensor_ids, count, 32)
    if offsets:
        _check_ints("offsets", offsets, count, 56)
    _check_scalars("streams", streams, (k,), device, torch.int64)
    _check_scalars("counters", counters, (1 + count,), device, torch.int64)
    if update is not None:
        _check_scalars("update", update, tuple(update.shape) if update.numel() == 1 else (1,), device, torch.int64)
    for name, x, shape in (
        ("coeffs", coeffs, (k, count)),
        ("restore", restore, (k, count)),
        ("curvature", curvature, (k, count)),
        ("squares", squares, (k, count)),
        ("decay", decay, (count,)),
        ("smoothing", smoothing, (count,)),
    ):
        if x is not None:
            _check_scalars(name, x, shape, device)
    if distribution not in reference.DISTRIBUTIONS:
        raise ValueError(f"distribution: expected one of {list(reference.DISTRIBUTIONS)}, got {distribution!r}")
    _check_factored(distribution, rank, columns, src, offsets)
    changes_hessians = curvature is not None
    if changes_hessians and distribution == "factored":
        raise ValueError(
            "curvature: expected None with distribution 'factored', got a tensor: a Hessian learns from z^2, which is 1 for "
            "every element at rank 1; take 'gaussian', or give hessians that are only read"
        )
    if len({x is None for x in (restore, curvature, smoothing)}) > 1:
        raise ValueError("restore, curvature, smoothing: expected all three or none")
    if hessians or changes_hessians:
        _check_tensors("hessians", hessians, device, (torch.float32,))
        _check_shapes("hessians", hessians, read, src)
    if (row_scales is None) != (column_scales is None):
        raise ValueError("row_scales, column_scales: expected both or none")
    if row_scales is not None and hessians:
        raise ValueError(
            f"row_scales, column_scales: expected without hessians, got {len(hessians)} hessians too: the noise of a call is "
            "scaled by one or the other"
        )
    if squares is not None and (distribution != "gaussian" or hessians or changes_hessians or row_scales is not None):
        raise ValueError(
            f"squares: expected None with distribution {distribution!r}, {len(hessians)} hessians and {len(row_scales or [])} "
            "row_scales, got a tensor: the second moment takes Gaussian noise without other scales (of signs it is one number, by "
            "which coeffs can be divided)"
        )
    if not 0 < hessian_min <= hessian_max:
        raise ValueError(f"hessian_min, hessian_max: expected 0 < min <= max, got {hessian_min} and {hessian_max}")
    kept = _check_residuals(residuals, read, src, device) if residuals is not None else {}
    scales = {f"hessians[{i}]": h for i, h in enumerate(hessians)}
    if row_scales is not None and column_scales is not None:
        scales = _check_scales(row_scales, column_scales, read, src, offsets, device)
    sources = {} if in_place else {f"src[{i}]": t for i, t in enumerate(src)} | kept
    targets = {f"{written}[{i}]": t for i, t in enumerate(dst)} | (kept if in_place else {})
    _check_overlap(targets | (scales if changes_hessians else {}), sources if changes_hessians else sources | scales)


def _check_rows(
    src: Tensor, rows: Tensor, dst: Tensor, tensor_id: int, offset: int, streams: Tensor, coeffs: Tensor,
    residual: Tensor | None = None, hessian: Tensor | None = None, row_scale: Tensor | None = None,
    column_scale: Tensor | None = None, **options: Any,
) -> None:  # fmt: skip
    if src.dim() != 2 or rows.dim() != 1 or tuple(dst.shape) != (rows.numel(), src.shape[1]):
        raise ValueError(
            f"src, rows, dst: expected shapes (r, d), (n,), (n, d), got {tuple(src.shape)}, {tuple(rows.shape)}, "
            f"{tuple(dst.shape)}"
        )
    _check_scalars("rows", rows, tuple(rows.shape), streams.device, torch.int64)
    if not rows.is_contiguous():
        raise ValueError("rows: expected a contiguous tensor: pass rows.contiguous()")
    beside = {"residual": residual, "hessian": hessian, "row_scale": row_scale, "column_scale": column_scale}
    given = {name: x for name, x in beside.items() if x is not None}
    lists: dict[str, Any] = {f"{name}s": [x] for name, x in given.items()}
    hessians = lists.pop("hessians", [])
    _check_pass([src], [src], hessians, [tensor_id], [offset], streams, coeffs, in_place=True, **lists, **options)
    _check_tensors("dst", [dst], streams.device, DTYPES)
    _check_overlap({"dst": dst}, {"src": src, "rows": rows} | given)


def _check_replay(
    weights: Sequence[Tensor], tensor_ids: Sequence[int], offsets: Sequence[int], streams: Tensor, coeffs: Tensor, *,
    decay: Tensor | None = None, updates: Tensor | None = None, **options: Any,
) -> None:  # fmt: skip
    if streams.dim() != 2:
        raise ValueError(f"streams: expected shape (S, K), one row a step, got {tuple(streams.shape)}")
    (steps, k), count = streams.shape, len(weights)
    for name, x, shape, dtype in (
        ("coeffs", coeffs, (steps, k, count), torch.float32),
        ("decay", decay, (steps, count), torch.float32),
        ("updates", updates, (steps,), torch.int64),
    ):
        if x is not None:
            _check_scalars(name, x, shape, streams.device, dtype)
    one = streams.new_empty(k), coeffs.new_empty(k, count)  # a step of it: all else is as in a pass
    _check_pass(weights, weights, [], tensor_ids, offsets, *one, in_place=True, **options)


def _check_philox(words: Tensor, *, rounds: int = ROUNDS, **numbers: int) -> None:
    if words.dtype != torch.int32 or words.dim() != 2 or words.shape[1] != 4 or not words.is_contiguous():
        raise ValueError(f"words: expected contiguous int32 of shape (n, 4), got {words.dtype} {tuple(words.shape)}")
    if rounds not in (7, 10):
        raise ValueError(f"rounds: expected 7 or 10, got {rounds}")
    for name, bits in (("domain", 8), ("tensor_id", 32), ("stream", 32), ("block", 56)):
        if not 0 <= numbers[name] < 1 << bits:
            raise ValueError(f"{name}: expected an integer in [0, 2^{bits}), got {numbers[name]}")


def _check_signs(signs: Tensor, streams: Tensor, *, domain: int, tensor_id: int, **_: int) -> None:
    _check_scalars("streams", streams, (streams.numel(),), signs.device, torch.int64)
    if signs.dtype != torch.float32 or signs.dim() != 3 or len(signs) != len(streams) or not signs.is_contiguous():
        raise ValueError(
            f"signs: expected contiguous float32 of shape (K, rank, n) with K = {len(streams)} streams, got {signs.dtype} "
            f"{tuple(signs.shape)}"
        )
    if not signs.shape[1] <= reference.MAX_RANK:
        raise ValueError(f"signs: expected a rank of {reference.MAX_RANK} at most, got shape {tuple(signs.shape)}")
    for name, value, bits in (("domain", domain, 8), ("tensor_id", tensor_id, 32)):
        if not 0 <= value < 1 << bits:
            raise ValueError(f"{name}: expected an integer in [0, 2^{bits}), got {value}")


# ---- dispatch --------------------------------------------------------------------------------------------------


@cache
def _say_once(text: str) -> None:
    warn(text)


def backend_for(device: torch.device) -> ModuleType:
    """The module whose ``run_pass``, ``run_rows``, ``philox_`` and ``signs_`` serve tensors on this device.

    The CPU takes the native library and CUDA the Triton kernels, where they are there and right (``bindings.cuda``); all else
    takes the torch reference, and so does everything where ``ZO_CORE_BACKEND=reference`` says so.
    """
    backend: ModuleType = reference
    if native.CHOICE == "reference":
        pass
    elif device.type == "cuda":
        backend = cuda.backend_for(device)
    elif device.type == "cpu" and native.available():
        backend = native
    elif device.type == "cpu":
        _say_once(f"zo_core: cpu tensors take the slow torch reference (native library: {native.why_missing})")
    else:
        _say_once(
            f"zo_core: {device.type} tensors take the slow torch reference, as there is no other backend for them"
        )
    return backend


def prepare(device: torch.device, src: Any, dst: Any, **beside: Any) -> Callable[..., None]:
    """A pass on tensors that stay where they are, unchecked, as a function of src, which it does not keep, and the scalars.

    A backend that has a ``prepare`` is spared a look at each tensor in every call.
    """
    backend = backend_for(device)
    if not hasattr(backend, "prepare"):
        return lambda src, **scalars: backend.run_pass(src, dst, **beside, **scalars)
    run = backend.prepare(src, dst, **beside)
    return lambda _, **scalars: run(**scalars)


def prepare_signs(device: torch.device, parts: Sequence[tuple[int, int, int, int, int]]) -> Callable[..., None]:
    """Signs of many tensors, unchecked, as a function of where they go, the streams and the coefficients.

    A backend that has a ``prepare_signs`` makes them in one launch.

    Args:
        device: of all that the function is given.
        parts: domain, tensor id, where its signs begin, how many they are, and the column of its coefficients.

    Returns:
        A function of ``out``, contiguous float32 (K, rank, n), ``streams``, int64 (K,), ``coeffs``, contiguous float32 (K, T), and ``seed``:
        for each part, the signs of stream k and factor q times coeffs[k, column] go to out[k, q, begin : begin + count].
    """
    backend = backend_for(device)
    if hasattr(backend, "prepare_signs"):
        at_once: Callable[..., None] = backend.prepare_signs(device, parts)
        return at_once

    def one_by_one(out: Tensor, streams: Tensor, coeffs: Tensor, *, seed: int) -> None:
        for domain, tensor_id, begin, count, column in parts:
            signs = out.new_empty(*out.shape[:2], count)
            backend.signs_(signs, streams, domain=domain, tensor_id=tensor_id, seed=seed)
            torch.mul(signs, coeffs[:, column].view(-1, 1, 1), out=out[..., begin : begin + count])

    return one_by_one


def _run(
    src: list[Tensor], dst: list[Tensor], *args: Any, in_place: bool, seed: int, residuals: list[Tensor] | None = None,
    row_scales: list[Tensor] | None = None, column_scales: list[Tensor] | None = None, columns: list[int] | None = None,
    **options: Any,
) -> None:  # fmt: skip
    _check_pass(
        src, dst, *args, in_place=in_place, seed=seed, residuals=residuals, row_scales=row_scales,
        column_scales=column_scales, columns=columns, **options,
    )  # fmt: skip
    kept = residuals or []
    backend_for(args[3].device).run_pass(
        src, dst, *args, seed=seed & _UINT64, residuals=kept, row_scales=row_scales or [],
        column_scales=column_scales or [], columns=columns or [], **options,
    )  # fmt: skip
    written = (*dst, *args[0], *kept) if in_place else dst
    increment_version([t for t in written if not t.is_inference()])


def _update_(weights: list[Tensor], *args: Any, **options: Any) -> None:
    _run(weights, weights, *args, in_place=True, **options)


def _perturb(src: list[Tensor], dst: list[Tensor], *args: Any, **options: Any) -> None:
    _run(src, dst, *args, in_place=False, **options)


def _perturb_rows(src: Tensor, rows: Tensor, dst: Tensor, *args: Any, seed: int, **options: Any) -> None:
    _check_rows(src, rows, dst, *args, seed=seed, **options)
    backend_for(src.device).run_rows(src, rows, dst, *args, seed=seed & _UINT64, **options)
    if not dst.is_inference():
        increment_version([dst])


def _replay_(
    weights: list[Tensor], tensor_ids: list[int], offsets: list[int], streams: Tensor, coeffs: Tensor, *, seed: int,
    decay: Tensor | None = None, updates: Tensor | None = None, residuals: list[Tensor] | None = None,
    columns: list[int] | None = None, **options: Any,
) -> None:  # fmt: skip
    args = weights, tensor_ids, offsets, streams, coeffs
    _check_replay(*args, seed=seed, decay=decay, updates=updates, residuals=residuals, columns=columns, **options)
    backend, kept = backend_for(streams.device), residuals or []
    options |= {"seed": seed & _UINT64, "residuals": kept, "columns": columns or []}
    if backend is native:
        native.run_steps(*args, decay=decay, updates=updates, **options)
    else:
        for s in range(len(streams)):
            step = {"decay": None if decay is None else decay[s], "update": None if updates is None else updates[s]}
            backend.run_pass(weights, weights, [], tensor_ids, offsets, streams[s], coeffs[s], **step, **options)
    increment_version([t for t in (*weights, *kept) if not t.is_inference()])


def _philox_(words: Tensor, *, seed: int, **options: int) -> None:
    _check_philox(words, **options)
    backend_for(words.device).philox_(words, seed=seed & _UINT64, **options)


def _signs_(signs: Tensor, streams: Tensor, *, seed: int, **options: int) -> None:
    _check_signs(signs, streams, **options)
    backend_for(signs.device).signs_(signs, streams, seed=seed & _UINT64, **options)
    if not signs.is_inference():
        increment_version([signs])


def _fake_update_(weights: list[Tensor], *args: Any, **options: Any) -> None:
    _check_pass(weights, weights, *args, in_place=True, **options)


def _fake_perturb(src: list[Tensor], dst: list[Tensor], *args: Any, **options: Any) -> None:
    _check_pass(src, dst, *args, in_place=False, **options)


def _fake_perturb_rows(*args: Any, **options: Any) -> None:
    _check_rows(*args, **options)


def _fake_replay_(*args: Any, **options: Any) -> None:
    _check_replay(*args, **options)


def _fake_philox_(words: Tensor, *, seed: int, **options: int) -> None:
    _check_philox(words, **options)


def _fake_signs_(signs: Tensor, streams: Tensor, *, seed: int, **options: int) -> None:
    _check_signs(signs, streams, **options)


_LIBRARY = torch.library.Library("zo_core", "DEF")  # type: ignore[no-untyped-call]
_KERNELS: tuple[tuple[Callable[..., None], Callable[..., None]], ...] = (
    (_update_, _fake_update_),
    (_perturb, _fake_perturb),
    (_perturb_rows, _fake_perturb_rows),
    (_replay_, _fake_replay_),
    (_philox_, _fake_philox_),
    (_signs_, _fake_signs_),
)
for _schema, (_kernel, _fake) in zip(_SCHEMAS, _KERNELS, strict=True):
    _name = _LIBRARY.define(_schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"zo_core::{_name}", _fake, lib=_LIBRARY)
