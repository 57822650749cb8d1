"""The fused update of any number of tensors, from its kernel down to one tile, then the launcher and the reference.

For each weight w, with noise z[k] of stream k, coefficients c[k] and a decay, all of the tensor:

    w <- (1 - decay) w + sum_k c[k] z[k]

z is made anew from the seed wherever it is needed (noise.py), so a step of MeZO reads and writes each weight once and
stores no noise. A kernel's program works on a run of tiles of one tensor. Tiles start at multiples of 1,024 of the
*element index*, so the Philox blocks of a tile are the same whatever offset a tensor starts at, and inside a tile their
numbers never carry into the upper word. Options: weights with residuals (residuals.py), scales of the noise by a Hessian or in
two factors (places.py), or by a second moment of the noise itself, results into another tensor, stochastic rounding (rounding.py).
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

import triton
import triton.language as tl

from ..reference import HESSIAN_RANGE, MOMENT_FLOOR
from .arguments import ROW, Call, Key, Made, Place, Stream, Work, load_row
from .factored import signs_of
from .forms import Form, pass_forms
from .gate import gate
from .launch import kernel, launch, on
from .noise import halves, inverse, root, rsqrt
from .places import elements, loaded_from, place_in, pointer_to, scales_of
from .residuals import join_residual, to_float32
from .rounding import limit_of, rounded_with_residual, rounding_bits, store_by_definition, within
from .streams import stream_of, sum_of_streams
from .sums import digits_of
from .table import Table, Tensors, table_of

# One warp a program: tests that concern a whole tile need no shared memory and no barrier. 32 elements a thread are
# 64 to 128 bytes in flight, which with 24 to 32 programs a multiprocessor covers the latency of HBM (Little's law:
# H100 25 bytes/ns/SM x 700 ns = 18 KB; 32 programs x 32 lanes x 64 bytes = 64 KB).
WARPS = 1
FLOOR = tl.constexpr(MOMENT_FLOOR)


@kernel(warps=WARPS, forms=pass_forms)
def pass_kernel(
    table, runs, n_tiles, go, k0, k1, streams, coeffs, n_tensors, n_streams, digits, words, reals, n_steps, plane, counters,
    decay, update, restore, curvature, smoothing, hessian_min, hessian_max, FORM: tl.constexpr,
):  # fmt: skip
    """A program works on up to ``n_tiles`` tiles of one tensor: ``runs`` names the row of ``table`` and the first tile."""
    run = tl.program_id(0).to(tl.int64) * 2
    row = load_row(table + tl.load(runs + run).to(tl.int64) * ROW)
    begin = tl.load(runs + run + 1).to(tl.int64)
    call = Call(
        k0.to(tl.uint32), k1.to(tl.uint32), streams, coeffs, n_tensors, n_streams,
        Made(digits, words, reals, n_steps, plane), counters, decay, update, restore, curvature, smoothing, hessian_min, hessian_max,
    )  # fmt: skip
    if (tl.load(go) != 0) & (tl.load(go + 1 + row.column) != 0):
        run_tiles(row, begin, tl.minimum(begin + n_tiles, tl.cdiv(row.end, FORM.size(False))), call, FORM)


@triton.jit
def run_tiles(row, begin, stop, call, FORM: tl.constexpr):
    """Tiles [begin, stop) of one tensor."""
    TILE: tl.constexpr = FORM.size(False)
    PART: tl.constexpr = FORM.size(True)
    keep, remain = 1.0, 1.0
    if FORM.decay:
        keep = 1 - tl.load(call.decay + row.column)
    if FORM.scale == "update":
        remain = 1 - tl.load(call.smoothing + row.column)
    if FORM.streams == "one" and not FORM.factored:
        work = Work(keep, remain, stream_of(0, row.column, call, FORM))
    else:
        work = Work(keep, remain, Stream(row.tensor_id, 0.0, 0.0, 0.0, True))
    # Tiles that are whole and aligned; a bit of ``rest`` marks each other one, and each where a number is out of range.
    whole = begin + (begin * TILE < row.begin).to(tl.int64)
    whole = tl.where(row.aligned, whole, stop)
    whole_stop = tl.maximum(tl.minimum(stop, row.end // TILE), whole)
    one = tl.full((), 1, tl.int64)  # the interpreter's loop variables are Python integers
    rest = ((one << (whole - begin)) - 1) | ((one << (stop - begin)) - (one << (whole_stop - begin)))
    line, column, columns, reciprocal, down, right = one, one, one, one, one, one
    if FORM.placed:  # the row and column where a tile starts, and how far on the next one does
        n = row.width if FORM.factored else row.columns
        down, right, _, _ = place_in(one * TILE, n, False)
        line, column, columns, reciprocal = place_in(row.first + whole * TILE, n, False)
    for t in range(whole, whole_stop):
        place = Place(line, column, columns, reciprocal)
        if not _tile(row, tl.multiple_of(one * t * TILE, TILE), place, work, call, FORM, False):
            rest |= one << (t - begin)
        if FORM.placed:
            over = column + right >= columns
            line += down + over
            column += right - tl.where(over, columns, 0)
    if rest != 0:
        for t in range(begin, stop):
            if (rest >> (t - begin)) & 1 != 0:
                for part in range(TILE // PART):
                    start = one * t * TILE + part * PART
                    place = Place(one, one, one, one)
                    if FORM.placed:
                        place = place_in(row.first + start, row.width if FORM.factored else row.columns, True)
                    _tile(row, start, place, work, call, FORM, True)


@triton.jit
def _tile(row, start, place, work, call, FORM: tl.constexpr, CAREFUL: tl.constexpr):
    """One tile, from element ``start`` on, which is at ``place``.

    Not CAREFUL: the tile is whole and aligned; false, and nothing written, where a result is not a number in range.
    CAREFUL: elements may be missing, unaligned, not finite or out of range.
    """
    A: tl.constexpr = FORM.shape
    B: tl.constexpr = FORM.size(CAREFUL) // 32 // A
    at = elements(A, B)
    mask = (at >= row.begin - start) & (at < row.end - start)
    dst = pointer_to(row.dst, start, at, FORM.dst, FORM, CAREFUL)
    residual, hessian = dst, dst
    loaded = loaded_from(pointer_to(row.src, start, at, FORM.src, FORM, CAREFUL), mask, 0.0, CAREFUL)
    left = loaded
    if FORM.residual:
        residual = pointer_to(row.residual, start, at, tl.int8 if FORM.residual == 8 else tl.int16, FORM, CAREFUL)
        left = loaded_from(residual, mask, 0, CAREFUL)
        weight = join_residual(loaded, left, CAREFUL)
    else:
        weight = to_float32(loaded)
    if FORM.scale == "hessian" or FORM.scale == "update":
        hessian = pointer_to(row.hessian, start, at, tl.float32, FORM, CAREFUL)
        h = loaded_from(hessian, mask, 1.0, CAREFUL)

    key = Key(row.first + start, row.tensor_id, call.k0, call.k1)
    noise, back, squares = sum_of_streams(weight, key, row, place, mask, work.only, call, B, FORM, CAREFUL)
    base = weight
    if FORM.scale == "factors":
        if FORM.factored:  # whose columns may be others
            place = place_in(row.first + start, row.columns, CAREFUL)
        noise = noise * scales_of(row, place, mask, A, B, FORM.neighbours(CAREFUL))
    elif FORM.scale == "moment":
        noise = noise * inverse(root(squares) + FLOOR)
    elif FORM.scale != "":
        scale = rsqrt(h)
        if FORM.scale == "update":
            base = tl.fma(back, scale, weight)
            h = tl.minimum(tl.maximum(h * (work.remain + squares), call.hessian_min), call.hessian_max)
            scale = rsqrt(h)
        noise = noise * scale
    out = tl.fma(base, work.keep, noise) if FORM.decay else base + noise

    random = tl.zeros((A, B, 32), tl.uint32)
    if FORM.stochastic:
        random = rounding_bits(key, tl.load(call.update).to(tl.uint32), A, B)
    if CAREFUL:
        beyond = store_by_definition(dst, residual, mask, loaded, left, weight, out, random, FORM)
        if FORM.scale == "update":
            tl.store(hessian, h, mask=mask)
        tl.atomic_add(call.counters + 1 + row.column, beyond.to(tl.int64), sem="relaxed")
        ordinary = True
    else:
        ordinary = within(out, limit_of(FORM.dst), A * B)
        if ordinary:
            rounded, rest = rounded_with_residual(out, random, left, FORM)
            if FORM.keeps:
                tl.store(residual, rest)
            tl.store(dst, rounded)
            if FORM.scale == "update":
                tl.store(hessian, h)
    return ordinary


def prepare(
    src: Sequence[Tensor], dst: Sequence[Tensor], hessians: Sequence[Tensor], tensor_ids: Sequence[int],
    offsets: Sequence[int], **beside: Sequence[Any],
) -> Callable[..., None]:  # fmt: skip
    """The pass of ``bindings.ops`` on these tensors, already checked, as a function of its scalars.

    It keeps no tensor alive: they are to stay where they are for as long as it is called.
    """
    return partial(_run, *_described(src, dst, hessians, tensor_ids, offsets, **beside), {})


def run_pass(
    src: Sequence[Tensor], dst: Sequence[Tensor], hessians: Sequence[Tensor], tensor_ids: Sequence[int],
    offsets: Sequence[int], streams: Tensor, coeffs: Tensor, *, residuals: Sequence[Tensor] = (),
    row_scales: Sequence[Tensor] = (), column_scales: Sequence[Tensor] = (), columns: Sequence[int] = (), **scalars: Any,
) -> None:  # fmt: skip
    """The pass of ``bindings.ops``, arguments already checked; tables are kept for the next call on these tensors."""
    beside: dict[str, Any] = {"residuals": residuals, "row_scales": row_scales, "column_scales": column_scales}
    key = _described(src, dst, hessians, tensor_ids, offsets, columns=columns, **beside)
    made = _prepared.setdefault(key, {})
    _prepared.move_to_end(key)
    if len(_prepared) > PREPARED:
        _prepared.popitem(last=False)
    _run(*key, made, streams, coeffs, **scalars)


PREPARED = 64  # calls whose tables are kept: each has 120 bytes a tensor and 8 a run of tiles
_prepared: OrderedDict[tuple[Tensors, str], dict[Any, list[tuple[Form, Table]]]] = OrderedDict()


def _described(
    src: Sequence[Tensor], dst: Sequence[Tensor], hessians: Sequence[Tensor], tensor_ids: Sequence[int],
    offsets: Sequence[int], *, residuals: Sequence[Tensor] = (), row_scales: Sequence[Tensor] = (),
    column_scales: Sequence[Tensor] = (), columns: Sequence[int] = (),
) -> tuple[Tensors, str]:  # fmt: skip
    """All that the tables of these tensors depend on, and the form of their Hessians."""
    scale = "factors" if row_scales else "hessian" if hessians else ""
    return Tensors.of(src, dst, hessians, tensor_ids, offsets, residuals, row_scales, column_scales, columns), scale


def _run(
    tensors: Tensors, scale: str, made: dict[Any, list[tuple[Form, Table]]], streams: Tensor, coeffs: Tensor, *, seed: int,
    distribution: str, counters: Tensor, decay: Tensor | None = None, update: Tensor | None = None,
    restore: Tensor | None = None, curvature: Tensor | None = None, smoothing: Tensor | None = None,
    squares: Tensor | None = None, hessian_min: float = HESSIAN_RANGE[0], hessian_max: float = HESSIAN_RANGE[1], rank: int = 1,
) -> None:  # fmt: skip
    """One launch for each kind of tensor, after a small one or two. ``made``: forms and tables so far, by what they depend on."""
    count, k, coeffs = len(tensors.src), streams.numel(), coeffs.contiguous()
    weights = curvature if squares is None else squares  # of z^2
    given = {"decay": decay, "restore": restore, "curvature": weights, "smoothing": smoothing}
    scalars = {name: x.contiguous() for name, x in given.items() if x is not None}
    if not count or (tensors.in_place and not k and not scalars):  # an optimizer has its tensors checked so
        return
    terms = (k * rank if distribution == "factored" else k), k
    scale = "update" if curvature is not None else "moment" if squares is not None else scale
    options = scale, update is not None, decay is not None
    with on(streams.device):
        if (key := (distribution, terms, options, streams.device)) not in made:
            kinds = tensors.kinds(distribution, terms, *options)
            made[key] = [(form, table_of(tensors, members, form, streams.device)) for form, members in kinds.items()]
        unread = dict.fromkeys((*given, "digits", "words", "reals"), coeffs)  # where a form reads nothing
        same = {
            **unread, "n_steps": 0, "plane": 0, **scalars, "streams": streams, "coeffs": coeffs, "counters": counters,
            "update": counters if update is None else update, "n_tensors": count, "n_streams": k, **halves(seed),
            "hessian_min": hessian_min, "hessian_max": min(hessian_max, 3.4e38),
            "go": gate(coeffs, counters, moves=not tensors.in_place, **scalars),
        }  # fmt: skip
        if any(form.streams == "sums" and not form.factored for form, _ in made[key]):
            same |= digits_of(coeffs)
        for form, (rows, runs, lines, plane, tiles) in made[key]:
            if len(runs):
                signs = signs_of(lines, plane, streams, coeffs, rank, seed) if form.factored else {}
                launch(pass_kernel, len(runs), table=rows, runs=runs, n_tiles=tiles, **same | signs, FORM=form)


def reference(weights: Tensor, z: Tensor, coeffs: Tensor, decay: float = 0.0) -> Tensor:
    """The equation above in torch, of one tensor with noise z (K, ...) and coefficients (K,), all float32.

    kernels/reference.py has the whole of docs/noise.md, tests/cases.py the cases that hold every backend against it.
    """
    return weights * (1 - decay) + (coeffs @ z.flatten(1)).view_as(weights)
