"""Scales of the noise in two factors, one of its row and one of its column, of a tile of a tensor (docs/noise.md)."""

import triton
import triton.language as tl


@triton.jit
def place_of(e, columns):
    """Row and column of element e, int64."""
    line = (e.to(tl.uint64) // columns.to(tl.uint64)).to(tl.int64)
    return line, e - line * columns


@triton.jit
def places_of(line, place, columns, at):
    """Row and column, int64, of elements ``at``, int32 from 0 to 1023, after the one in row ``line`` and column ``place``.

    Of a row longer than 1024 only the last 1024 count here, so that 32 bits are enough until the end: with n up to 1024 and
    x below n + 1023, x n is below 2^21, so the upper bits of x (2^21 / n + 1), which is below 2^31, are x / n.
    """
    short = tl.minimum(columns, 1024).to(tl.int32)
    x = short - tl.minimum(columns - place, short).to(tl.int32) + at
    down = (x * ((1 << 21) // short + 1)) >> 21
    return line + down, place + at - down * columns


@triton.jit
def scales_of(row, line, place, mask, A: tl.constexpr, B: tl.constexpr, WIDTH: tl.constexpr, CAREFUL: tl.constexpr):
    """float32 scales (A, B, 32) of a tile that starts in row ``line`` and column ``place``; no row_scale, 0: a factor of 1.

    Not CAREFUL: columns are a multiple of 8, so that WIDTH neighbours are in one row and their columns' factors are read at once.
    """
    columns = row.columns
    rows, values = row.row_scale.to(tl.pointer_type(tl.float32)), row.column_scale.to(tl.pointer_type(tl.float32))
    start = (tl.arange(0, A) * 32)[:, None, None] + (tl.arange(0, B) * (32 * A))[None, :, None]
    at = start + tl.arange(0, 32)[None, None, :]
    if CAREFUL:
        down, right = places_of(line, place, columns, at)
        known = mask & (tl.broadcast_to(row.row_scale, (A, B, 32)) != 0)
        return tl.load(rows + down, mask=known, other=1.0) * tl.load(values + right, mask=mask, other=1.0)
    else:
        down, _ = places_of(line, place, columns, start + (tl.arange(0, 32 // WIDTH) * WIDTH)[None, None, :])
        factor = tl.load(rows + down, mask=tl.broadcast_to(row.row_scale, (A, B, 32 // WIDTH)) != 0, other=1.0)
        factor = tl.reshape(tl.broadcast_to(factor[:, :, :, None], (A, B, 32 // WIDTH, WIDTH)), (A, B, 32))
        _, right = places_of(line, place, columns, at & -WIDTH)
        values += tl.max_contiguous(tl.multiple_of(right + (at & (WIDTH - 1)), (1, 1, WIDTH)), (1, 1, WIDTH))
        return factor * tl.load(tl.multiple_of(values, (1, 1, 16)))
