"""The pass of ``bindings.ops`` in Triton: one launch for all tensors of a dtype, whatever their number.

A device table has a row of twelve int64 for each tensor; a second one names a tensor and a run of tiles for each
program. Tiles start at multiples of TILE of the *element index*, so a tile's Philox blocks are the same whatever
offset a tensor starts at, and their block numbers never carry into the upper word.
"""

from typing import Any

import triton
import triton.language as tl

from .noise import INTERPRET, RADIUS, gaussian, philox, round_to, rounding_bits, rsqrt, signed, signs
from .residuals import join_residual, split_residual, to_float32
from .sums import weighted_signs

# One warp a program: tests that concern a whole tile need no shared memory and no barrier. 32 elements a thread are
# 64 to 128 bytes in flight, which with 24 to 32 programs a multiprocessor covers the latency of HBM (Little's law:
# H100 25 bytes/ns/SM x 700 ns = 18 KB; 32 programs x 32 lanes x 64 bytes = 64 KB).
WARPS = 1
ROW = tl.constexpr(12)  # int64 of a tensor in the table
TILE = 1024
PART = tl.constexpr(128)
MIN_SUMS = 5
TILES = 32  # at most 62, the bits of _tiles' mask; a program: its first loads (table, scalars), about 1 us, are then under 5% of its time

NO_HESSIAN = tl.constexpr(0)  # the forms of the Hessian argument: none, read, or updated; or scales in two factors
SCALED = tl.constexpr(1)
UPDATED = tl.constexpr(2)
FACTORED = tl.constexpr(3)

_LIMITS = {tl.float32: 3.4028234663852886e38, tl.bfloat16: 3.3895313892515355e38, tl.float16: 65504.0}


@triton.constexpr_function
def _limit(dtype):
    return _LIMITS[dtype]


@triton.jit
def _finite_or_zero(at, mask):
    """Whether all are finite, and which are not zero, of a block of scalars."""
    x = tl.load(at, mask=mask, other=0.0)
    return tl.abs(x) < float("inf"), x != 0


@triton.jit
def gate_kernel(
    coeffs, restore, curvature, decay, smoothing, go, counters, n_tensors, n_streams,
    MOVES: tl.constexpr, HAS_DECAY: tl.constexpr, UPDATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """go[0]: all scalars are finite. go[1 + i]: the pass has work for tensor i. One program; counts a void pass."""
    finite = tl.full((BLOCK,), 1, tl.int1)
    for first in range(0, n_tensors, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = column < n_tensors
        work = tl.full((BLOCK,), MOVES, tl.int1)
        for k in range(n_streams):
            at = k * n_tensors + column
            ok, some = _finite_or_zero(coeffs + at, mask)
            finite, work = finite & ok, work | some
            if UPDATES:
                ok, some = _finite_or_zero(restore + at, mask)
                finite, work = finite & ok, work | some
                ok, some = _finite_or_zero(curvature + at, mask)
                finite, work = finite & ok, work | some
        if HAS_DECAY:
            ok, some = _finite_or_zero(decay + column, mask)
            finite, work = finite & ok, work | some
        if UPDATES:
            ok, some = _finite_or_zero(smoothing + column, mask)
            finite, work = finite & ok, work | some
        tl.store(go + 1 + column, work.to(tl.int32), mask=mask)
    all_finite = tl.min(finite.to(tl.int32), axis=0)
    tl.store(go, all_finite)
    if all_finite == 0:
        tl.atomic_add(counters, tl.full((), 1, tl.int64))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _within(x, limit, ROWS: tl.constexpr):
    """Whether |x| <= limit everywhere; false for NaN. One FMNMX an element, then one REDUX a warp."""
    if INTERPRET:
        return tl.min((tl.abs(x) <= limit).to(tl.int32)) != 0
    # Patterns of floats that are not negative have their order, and NaN comes out on top.
    largest = tl.reduce(tl.reshape(tl.abs(x), (ROWS, 8, 4)), 2, _larger)
    return tl.max(largest.to(tl.int32, bitcast=True)) <= limit.to(tl.int32, bitcast=True)


@triton.jit
def _load(at, mask, other, CAREFUL: tl.constexpr):
    if CAREFUL:
        return tl.load(at, mask=mask, other=other)
    return tl.load(at)


@triton.jit
def _zeros_like(x):
    """Zeros in the registers of x: what a loop carries keeps the layout it starts with, and one that differs from that of
    the noise costs a pass through shared memory for each stream (31 instructions a weight where this costs none).
    """
    if INTERPRET:
        return tl.zeros_like(x)
    return tl.inline_asm_elementwise("mov.f32 $0, 0f00000000;", "=r,r", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _stream(
    k, column, streams, coeffs, restore, curvature, n_tensors, DISTRIBUTION: tl.constexpr, HESSIAN: tl.constexpr
):
    """Coefficients of stream k in a tensor, for noise as the device functions make it; its number; whether any is not 0."""
    at = k * n_tensors + column
    c = tl.load(coeffs + at)
    r, q = c, c
    some = c != 0
    if HESSIAN == 2:
        r, q = tl.load(restore + at), tl.load(curvature + at)
        some = some | (r != 0) | (q != 0)
    if not DISTRIBUTION:
        c, r, q = c * RADIUS, r * RADIUS, q * (RADIUS * RADIUS)
    return c, r, q, tl.load(streams + k).to(tl.uint32), some


@triton.jit
def _pointer(address, start, TYPE: tl.constexpr, RESIDUAL: tl.constexpr):
    """To element ``start`` of a tensor. With residuals: one addition to an address, where to a pointer it is many."""
    if RESIDUAL:
        return (address + start * (TYPE.primitive_bitwidth // 8)).to(tl.pointer_type(TYPE))
    else:
        return address.to(tl.pointer_type(TYPE)) + start


@triton.jit
def _place(e, columns):
    """Row and column of element e, int64."""
    line = (e.to(tl.uint64) // columns.to(tl.uint64)).to(tl.int64)
    return line, e - line * columns


@triton.jit
def _places(line, place, columns, at):
    """Row and column, int64, of elements ``at``, int32 from 0 to 1023, after the one in row ``line`` and column ``place``.

    Of a row longer than 1024 only the last 1024 count here, so that 32 bits are enough until the end: with n up to 1024 and
    x below n + 1023, x n is below 2^21, so the upper bits of x (2^21 / n + 1), which is below 2^31, are x / n.
    """
    short = tl.minimum(columns, 1024).to(tl.int32)
    x = short - tl.minimum(columns - place, short).to(tl.int32) + at
    down = (x * ((1 << 21) // short + 1)) >> 21
    return line + down, place + at - down * columns


@triton.jit
def _scales(
    row_scale, column_scale, columns, line, place, a, b, mask, CAREFUL: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """float32 scales (A, B, 32) of a tile that starts in row ``line`` and column ``place``; no row_scale, 0: a factor of 1.

    Not CAREFUL: columns are a multiple of 8, so that WIDTH neighbours are in one row and their columns' factors are read at once.
    """
    rows, values = row_scale.to(tl.pointer_type(tl.float32)), column_scale.to(tl.pointer_type(tl.float32))
    start = a[:, None, None] + b[None, :, None]
    at = start + tl.arange(0, 32)[None, None, :]
    if CAREFUL:
        row, column = _places(line, place, columns, at)
        known = mask & (tl.broadcast_to(row_scale, (A, B, 32)) != 0)
        return tl.load(rows + row, mask=known, other=1.0) * tl.load(values + column, mask=mask, other=1.0)
    else:
        row, _ = _places(line, place, columns, start + (tl.arange(0, 32 // WIDTH) * WIDTH)[None, None, :])
        factor = tl.load(rows + row, mask=tl.broadcast_to(row_scale, (A, B, 32 // WIDTH)) != 0, other=1.0)
        factor = tl.reshape(tl.broadcast_to(factor[:, :, :, None], (A, B, 32 // WIDTH, WIDTH)), (A, B, 32))
        _, column = _places(line, place, columns, at & -WIDTH)
        values += tl.max_contiguous(tl.multiple_of(column + (at & (WIDTH - 1)), (1, 1, WIDTH)), (1, 1, WIDTH))
        return factor * tl.load(tl.multiple_of(values, (1, 1, 16)))


@triton.jit
def _tile(
    src, dst, residual, hessian, row_scale, column_scale, columns, line, place, start, shift, end, first, tensor_id, column, keep, remain, c, r, q, stream, streams, digits, totals, scales, n_steps, coeffs, restore, curvature,
    update, counters, k0, k1, n_tensors, n_streams, hessian_min, hessian_max,
    DISTRIBUTION: tl.constexpr, HESSIAN: tl.constexpr, RESIDUAL: tl.constexpr, KEEPS: tl.constexpr, STOCHASTIC: tl.constexpr,
    HAS_DECAY: tl.constexpr, ONE: tl.constexpr, SUMS: tl.constexpr, CAREFUL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One tile: elements [start, start + TILE) of a tensor whose element 0 has index ``first``, valid in [shift, end).

    Not CAREFUL: the tile is whole and aligned; false, and nothing written, where a result is not a number in range.
    CAREFUL: elements may be missing, unaligned, not finite or out of range.
    """
    # Gaussian rows follow each other in memory. Of a Rademacher tile a thread has the four rows of its own blocks.
    A: tl.constexpr = 4 if DISTRIBUTION else 1
    B: tl.constexpr = TILE // 32 // A
    STRIDE_A: tl.constexpr = 32 if DISTRIBUTION else TILE
    STRIDE_B: tl.constexpr = 128 if DISTRIBUTION else 32
    WIDTH: tl.constexpr = 4 if src.dtype.element_ty == tl.float32 and dst.dtype.element_ty == tl.float32 else 8
    a = tl.arange(0, A) * STRIDE_A
    b = tl.arange(0, B) * STRIDE_B
    at = a[:, None, None] + b[None, :, None] + tl.arange(0, 32)[None, None, :]
    mask = (at >= shift - start) & (at < end - start)
    loaded = _load(src + at, mask, 0.0, CAREFUL)
    if RESIDUAL:
        left = _load(residual + at, mask, 0, CAREFUL)
        weight = join_residual(loaded, left, CAREFUL)
    else:
        weight = to_float32(loaded)
    if HESSIAN == 1 or HESSIAN == 2:
        h = _load(hessian + at, mask, 1.0, CAREFUL)

    noise = _zeros_like(weight)
    back = noise
    squares = noise
    n_loop = 1 if ONE else n_streams
    if SUMS and not CAREFUL:
        n_loop = 0
    for k in range(n_loop):
        if not ONE:
            c, r, q, stream, some = _stream(
                k, column, streams, coeffs, restore, curvature, n_tensors, DISTRIBUTION, HESSIAN
            )
        if ONE or some:
            if DISTRIBUTION:
                words = signs(first + start, tensor_id, stream, k0, k1, B)
                cz = signed(words, c, (A, B, 32))
                noise = cz if ONE else noise + cz
                if HESSIAN == 2:
                    back += signed(words, r, (A, B, 32))
                    squares += q
            else:
                z = gaussian(first + start, tensor_id, stream, k0, k1, B, WIDTH)
                noise = c * z if ONE else tl.fma(z, c, noise)
                if HESSIAN == 2:
                    back = tl.fma(z, r, back)
                    squares = tl.fma(z * z, q, squares)

    if SUMS and not CAREFUL:
        noise = weighted_signs(
            first + start, tensor_id, column, streams, digits, totals, scales, n_streams, n_steps, k0, k1, B
        )

    base = weight
    if HESSIAN == 3:
        noise = noise * _scales(row_scale, column_scale, columns, line, place, a, b, mask, CAREFUL, A, B, WIDTH)
    elif HESSIAN != 0:
        scale = rsqrt(h)
        if HESSIAN == 2:
            base = tl.fma(back, scale, weight)
            h = tl.minimum(tl.maximum(h * (remain + squares), hessian_min), hessian_max)
            scale = rsqrt(h)
        noise = noise * scale
    out = tl.fma(base, keep, noise) if HAS_DECAY else base + noise

    DTYPE: tl.constexpr = dst.dtype.element_ty
    random = tl.zeros((A, B, 32), tl.uint32)
    if STOCHASTIC and tl.float32 != DTYPE:
        number = tl.load(update).to(tl.uint32)
        random = rounding_bits(first + start, tensor_id, number, k0, k1, A, B, STRIDE_A, STRIDE_B)
    LIMIT: tl.constexpr = _limit(DTYPE)
    if CAREFUL:  # the definition, element by element
        finite = tl.abs(weight) < float("inf")
        beyond = mask & finite & ~(tl.abs(out) <= LIMIT)
        clamped = tl.where(out != out, weight, tl.where(out < 0, -LIMIT, LIMIT))
        out_of = tl.where(beyond, clamped, out)
        if KEEPS:
            rounded, rest = split_residual(out_of, random, DTYPE, RESIDUAL, STOCHASTIC)
            same = beyond & (out != out)  # the bits as they were
            rounded = tl.where(finite & ~same, rounded, loaded.to(tl.int16, bitcast=True))
            tl.store(residual + at, tl.where(finite, tl.where(same, left, rest), 0), mask=mask)
            rounded = rounded.to(DTYPE, bitcast=True)
        else:
            rounded = round_to(out_of, random, DTYPE, STOCHASTIC)
            rounded = tl.where(finite, rounded, round_to(weight, random, DTYPE, False))
        tl.store(dst + at, rounded, mask=mask)
        if HESSIAN == 2:
            tl.store(hessian + at, h, mask=mask)
        tl.atomic_add(counters + 1 + column, tl.sum(beyond.to(tl.int32)).to(tl.int64), sem="relaxed")
    ordinary = True
    if not CAREFUL:
        ordinary = _within(out, tl.full((), LIMIT, tl.float32), TILE // 32)
        if ordinary:
            if KEEPS:
                rounded, rest = split_residual(out, random, DTYPE, RESIDUAL, STOCHASTIC)
                tl.store(residual + at, rest)
                rounded = rounded.to(DTYPE, bitcast=True)
            else:
                rounded = round_to(out, random, DTYPE, STOCHASTIC)
            tl.store(dst + at, rounded)
            if HESSIAN == 2:
                tl.store(hessian + at, h)
    return ordinary


@triton.jit
def _tiles(
    src, dst, residual, hessian, row_scale, column_scale, columns, shift, end, first, tensor_id, column, aligned, begin, stop, streams, digits, totals, scales, n_steps, coeffs, restore, curvature,
    decay, smoothing, update, counters, k0, k1, n_tensors, n_streams, hessian_min, hessian_max,
    SRC_TYPE: tl.constexpr, DST_TYPE: tl.constexpr, DISTRIBUTION: tl.constexpr, HESSIAN: tl.constexpr, RESIDUAL: tl.constexpr,
    KEEPS: tl.constexpr, STOCHASTIC: tl.constexpr, HAS_DECAY: tl.constexpr, ONE: tl.constexpr, SUMS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Tiles [begin, stop) of one tensor. ``src``, ``dst``, ``residual``, ``hessian`` are addresses."""
    REST_TYPE: tl.constexpr = tl.int8 if RESIDUAL == 8 else tl.int16
    keep, remain = 1.0, 1.0
    if HAS_DECAY:
        keep = 1 - tl.load(decay + column)
    if HESSIAN == 2:
        remain = 1 - tl.load(smoothing + column)
    k0, k1 = k0.to(tl.uint32, bitcast=True), k1.to(tl.uint32, bitcast=True)
    c, r, q, stream = 0.0, 0.0, 0.0, tensor_id
    if ONE:
        c, r, q, stream, _ = _stream(0, column, streams, coeffs, restore, curvature, n_tensors, DISTRIBUTION, HESSIAN)
    # Tiles that are whole and aligned; a bit of ``rest`` marks each other one, and each where a number is out of range.
    whole = begin + (begin * TILE < shift).to(tl.int64)
    whole = tl.where(aligned, whole, stop)
    whole_stop = tl.maximum(tl.minimum(stop, end // TILE), whole)
    one = tl.full((), 1, tl.int64)  # the interpreter's loop variables are Python integers
    rest = ((one << (whole - begin)) - 1) | ((one << (stop - begin)) - (one << (whole_stop - begin)))
    line, place, down, right = one, one, one, one
    if HESSIAN == 3:  # the row and column where a tile starts, and how far on the next one does
        line, place = _place(first + whole * TILE, columns)
        down, right = _place(one * TILE, columns)
    for t in range(whole, whole_stop):
        start = one * t * TILE
        # An address from a table has no known alignment: the hint, on the pointer, gives 128-bit accesses.
        ordinary = _tile(
            tl.multiple_of(_pointer(src, start, SRC_TYPE, RESIDUAL), 16),
            tl.multiple_of(_pointer(dst, start, DST_TYPE, RESIDUAL), 16),
            tl.multiple_of(_pointer(residual, start, REST_TYPE, RESIDUAL), 8 if RESIDUAL == 8 else 16),
            tl.multiple_of(_pointer(hessian, start, tl.float32, RESIDUAL), 16),
            row_scale, column_scale, columns, line, place, tl.multiple_of(start, TILE), shift, end, first, tensor_id, column, keep, remain, c, r, q, stream, streams, digits, totals, scales, n_steps,
            coeffs, restore, curvature, update, counters, k0, k1, n_tensors, n_streams, hessian_min, hessian_max,
            DISTRIBUTION, HESSIAN, RESIDUAL, KEEPS, STOCHASTIC, HAS_DECAY, ONE, SUMS, False, TILE,
        )  # fmt: skip
        if not ordinary:
            rest |= one << (t - begin)
        if HESSIAN == 3:
            line, place = line + down, place + right
            if place >= columns:
                line, place = line + 1, place - columns
    # In smaller steps: few registers for what runs seldom.
    if rest != 0:
        for t in range(begin, stop):
            if (rest >> (t - begin)) & 1 != 0:
                for part in range(TILE // PART):
                    start = one * t * TILE + part * PART
                    if HESSIAN == 3:
                        line, place = _place(first + start, columns)
                    _tile(
                        _pointer(src, start, SRC_TYPE, RESIDUAL),
                        _pointer(dst, start, DST_TYPE, RESIDUAL),
                        _pointer(residual, start, REST_TYPE, RESIDUAL),
                        _pointer(hessian, start, tl.float32, RESIDUAL),
                        row_scale, column_scale, columns, line, place, start, shift, end, first, tensor_id, column, keep, remain, c, r, q, stream, streams, digits, totals, scales, n_steps,
                        coeffs, restore, curvature, update, counters, k0, k1, n_tensors, n_streams, hessian_min, hessian_max,
                        DISTRIBUTION, HESSIAN, RESIDUAL, KEEPS, STOCHASTIC, HAS_DECAY, ONE, SUMS, True, PART,
                    )  # fmt: skip


@triton.jit(do_not_specialize=["k0", "k1", "n_tensors", "n_streams", "n_steps", "hessian_min", "hessian_max"])
def pass_kernel(
    table, runs, go, streams, digits, totals, scales, n_steps, coeffs, restore, curvature, decay, smoothing, update, counters, k0, k1, n_tensors,
    n_streams, hessian_min, hessian_max,
    SRC_TYPE: tl.constexpr, DST_TYPE: tl.constexpr, DISTRIBUTION: tl.constexpr, HESSIAN: tl.constexpr,
    RESIDUAL: tl.constexpr, KEEPS: tl.constexpr, STOCHASTIC: tl.constexpr, HAS_DECAY: tl.constexpr, ONE: tl.constexpr, SUMS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A program works on up to TILES tiles of one tensor: ``runs`` names the row of ``table`` and the first tile."""
    run = tl.program_id(0).to(tl.int64) * 2
    row = table + tl.load(runs + run).to(tl.int64) * ROW
    begin = tl.load(runs + run + 1).to(tl.int64)
    column = tl.load(row + 7)
    aligned = (column & 1) != 0
    column = column >> 1
    if (tl.load(go) != 0) & (tl.load(go + 1 + column) != 0):
        end = tl.load(row + 4)
        stop = tl.minimum(begin + TILES, tl.cdiv(end, TILE))
        _tiles(
            tl.load(row), tl.load(row + 1), tl.load(row + 8), tl.load(row + 2), tl.load(row + 9), tl.load(row + 10),
            tl.load(row + 11), tl.load(row + 3), end, tl.load(row + 5),
            tl.load(row + 6).to(tl.uint32), column, aligned, begin, stop, streams, digits, totals, scales, n_steps, coeffs, restore, curvature,
            decay, smoothing, update, counters, k0, k1, n_tensors, n_streams, hessian_min, hessian_max,
            SRC_TYPE, DST_TYPE, DISTRIBUTION, HESSIAN, RESIDUAL, KEEPS, STOCHASTIC, HAS_DECAY, ONE, SUMS, TILE,
        )  # fmt: skip


_NOT_SPECIALIZED = "row_scale column_scale columns n_tiles width tensor_id offset k0 k1 n_streams n_steps".split()


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def rows_kernel(
    src, rows, dst, residual, hessian, row_scale, column_scale, columns, go, streams, digits, totals, scales, coeffs, counters, n_tiles, width, tensor_id, offset, k0, k1,
    n_streams, n_steps, DISTRIBUTION: tl.constexpr, HESSIAN: tl.constexpr, RESIDUAL: tl.constexpr, ONE: tl.constexpr, SUMS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A program makes one tile of one gathered row: a row is a tensor that starts at its own offset in the matrix."""
    j = (tl.program_id(0) // n_tiles).to(tl.int64)
    t = (tl.program_id(0) % n_tiles).to(tl.int64)
    row = tl.load(rows + j).to(tl.int64)
    at = offset.to(tl.int64) + row * width
    shift = at % TILE
    SRC_TYPE: tl.constexpr = src.dtype.element_ty
    DST_TYPE: tl.constexpr = dst.dtype.element_ty
    from_at = src.to(tl.int64) + (row * width - shift) * (SRC_TYPE.primitive_bitwidth // 8)
    to_at = dst.to(tl.int64) + (j * width - shift) * (DST_TYPE.primitive_bitwidth // 8)
    rest_at = residual.to(tl.int64) + (row * width - shift) * (RESIDUAL // 8)
    zero = tl.full((), 0, tl.int64)
    scale_at = hessian.to(tl.int64) + (row * width - shift) * 4 if HESSIAN == 1 else zero
    column_scale, columns = column_scale.to(tl.int64), columns.to(tl.int64)
    aligned = ((from_at | to_at | scale_at | column_scale | (columns & 7)) & 15) == 0
    if (tl.load(go) != 0) & (t * TILE < shift + width):
        _tiles(
            from_at, to_at, rest_at, scale_at, row_scale.to(tl.int64), column_scale, columns, shift, shift + width, at - shift, tensor_id.to(tl.uint32, bitcast=True), zero,
            aligned & ((rest_at & (RESIDUAL - 1 if RESIDUAL else 0)) == 0), t, t + 1, streams, digits, totals, scales, n_steps, coeffs, coeffs, coeffs,
            coeffs, coeffs, counters, counters, k0, k1, 1, n_streams, 0.0, 0.0,
            SRC_TYPE, DST_TYPE, DISTRIBUTION, HESSIAN, RESIDUAL, False, False, False, ONE, SUMS, TILE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n", "first", "skip", "tensor_id", "stream", "k0", "k1"])
def philox_kernel(
    words, n, first, skip, tensor_id, stream, k0, k1, DOMAIN: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr
):
    """Raw words of n blocks from ``first + skip``, a row of four each."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)
    block = first + start
    high = (block >> 32).to(tl.uint32) & 0xFFFFFF | (DOMAIN << 24)
    w0, w1, w2, w3 = philox(
        block.to(tl.uint32) + lanes.to(tl.uint32), high, tensor_id.to(tl.uint32, bitcast=True),
        stream.to(tl.uint32, bitcast=True), k0.to(tl.uint32, bitcast=True), k1.to(tl.uint32, bitcast=True), ROUNDS,
    )  # fmt: skip
    row = start + lanes - skip
    at = words + row * 4
    mask = (row >= 0) & (row < n)
    tl.store(at, w0.to(tl.int32, bitcast=True), mask=mask)
    tl.store(at + 1, w1.to(tl.int32, bitcast=True), mask=mask)
    tl.store(at + 2, w2.to(tl.int32, bitcast=True), mask=mask)
    tl.store(at + 3, w3.to(tl.int32, bitcast=True), mask=mask)


def use_sums(distribution: int, hessian: int, k: int) -> bool:
    """Whether sums of signs go to the tensor cores: from 5 streams on they are cheaper there."""
    return distribution == 1 and hessian in (0, 3) and k >= MIN_SUMS


def constants(
    src: Any,
    dst: Any,
    distribution: int,
    hessian: int,
    stochastic: bool,
    decay: bool,
    k: int,
    residual: int,
    keeps: bool,
) -> dict[str, Any]:
    """The compile-time arguments of ``pass_kernel`` for a call with k streams; a pass in place ``keeps`` its residuals."""
    stochastic = stochastic and dst != tl.float32 and not (keeps and residual == 16)
    return {
        "SRC_TYPE": src, "DST_TYPE": dst, "DISTRIBUTION": distribution, "HESSIAN": hessian, "RESIDUAL": residual,
        "KEEPS": keeps and residual > 0, "STOCHASTIC": stochastic, "HAS_DECAY": decay, "ONE": k == 1, "SUMS": use_sums(distribution, hessian, k), "TILE": TILE, "TILES": TILES,
    }  # fmt: skip
