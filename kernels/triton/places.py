"""In which rows and columns the elements of a tile are, and the scales of the noise that are looked up by them (docs/noise.md)."""

import triton
import triton.language as tl


@triton.jit
def place_of(e, columns):
    """Row and column of element e, int64."""
    line = (e.to(tl.uint64) // columns.to(tl.uint64)).to(tl.int64)
    return line, e - line * columns


@triton.jit
def _rows_down(place, columns, at):
    """How many rows below an element in column ``place`` the ``at``-th after it is, int32; ``at`` from 0 to 1023.

    Of a row longer than 1024 only the last 1024 count here, so that 32 bits are enough: with n up to 1024 and x below
    n + 1023, x n is below 2^21, so the upper 32 bits of 2 x (2^31 / n + 1) are x / n.
    """
    short = tl.minimum(columns, 1024).to(tl.int32)
    x = short - tl.minimum(columns - place, short).to(tl.int32) + at
    return tl.umulhi((2 * x).to(tl.uint32), ((1 << 31) // short.to(tl.uint32) + 1).to(tl.uint32)).to(tl.int32)


@triton.jit
def places_of(place, columns, A: tl.constexpr, B: tl.constexpr, V: tl.constexpr):
    """Rows below the first element's, and columns, of a tile (A, B, 32) from column ``place`` on, both int64.

    V neighbours are in one row: rows are (A, B, 32 // V), and columns, (A, B, 32), are those of the first of V. With V above 1
    rows have less than 2^30 elements, and ``place`` and ``columns`` are int32.
    """
    at = (tl.arange(0, A) * 32)[:, None, None] + (tl.arange(0, B) * (32 * A))[None, :, None]
    down = _rows_down(place, columns, at + (tl.arange(0, 32 // V) * V)[None, None, :])
    at = at + (tl.arange(0, 32) & -V)[None, None, :]
    right = place + at - _rows_down(place, columns, at) * columns
    return down.to(tl.uint32).to(tl.int64), right if V == 1 else right.to(tl.uint32).to(tl.int64)


@triton.jit
def load_rows(pointer, down, known, A: tl.constexpr, B: tl.constexpr, V: tl.constexpr):
    """What ``pointer`` has of rows (A, B, 32 // V), to each of V neighbours, (A, B, 32); 1 where it is not ``known``."""
    x = tl.load(pointer + down, mask=known, other=1)
    return tl.reshape(tl.broadcast_to(x[:, :, :, None], (A, B, 32 // V, V)), (A, B, 32))


@triton.jit
def load_columns(pointer, right, mask, V: tl.constexpr):
    """What ``pointer`` has of columns, of V neighbours at once, which are aligned; ``right``: the first of V."""
    pointer += tl.max_contiguous(tl.multiple_of(right + (tl.arange(0, 32) & (V - 1))[None, None, :], (1, 1, V)), (1, 1, V))
    return tl.load(pointer, mask=mask, other=1) if V == 1 else tl.load(tl.multiple_of(pointer, (1, 1, 16)))


@triton.jit
def scales_of(row, line, place, mask, A: tl.constexpr, B: tl.constexpr, V: tl.constexpr):
    """float32 scales (A, B, 32) of a tile that starts in row ``line`` and column ``place``; no row_scale, 0: a factor of 1."""
    down, right = places_of(place, row.columns.to(place.dtype), A, B, V)
    known = tl.broadcast_to(row.row_scale, down.shape) != 0
    rows, columns = row.row_scale.to(tl.pointer_type(tl.float32)), row.column_scale.to(tl.pointer_type(tl.float32))
    factor = load_rows(rows + line, down, known & mask if V == 1 else known, A, B, V)
    return factor * load_columns(columns, right, mask, V)
