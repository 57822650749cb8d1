"""Where the elements of a tile are in memory, and in which rows and columns, by which scales in two factors are looked up (docs/noise.md).

V neighbours along the last axis of a tile (A, B, 32) are in one row, and what belongs to their columns is loaded at once. V is 1 in
careful tiles (passes.py), and ``place`` has int64 there; else it has int32, as rows have less than 2^28 elements.
"""

import triton
import triton.language as tl

from .arguments import Place
from .launch import assembly


@triton.jit
def place_of(e, columns):
    """Row and column of element e, int64."""
    line = (e.to(tl.uint64) // columns.to(tl.uint64)).to(tl.int64)
    return line, e - line * columns


@triton.jit
def place_in(e, columns, CAREFUL: tl.constexpr):
    """The place of element e in rows of so many columns."""
    line, column = place_of(e, columns)
    inverse = (1 << 31) // tl.minimum(columns, 1024).to(tl.uint32) + 1
    if CAREFUL:
        return Place(line, column, columns, inverse)
    else:
        return Place(line, column.to(tl.int32), columns.to(tl.int32), inverse)


@triton.jit
def rows_down(place, at):
    """How many rows below an element in column ``place.column`` the ``at``-th after it is, int32; ``at`` from 0 to 1023.

    Of a row longer than 1024 only the last 1024 count, so that 32 bits are enough: with n up to 1024 and x below n + 1023, x n
    is below 2^21, so the upper 32 bits of 2 x (2^31 / n + 1) are x / n.
    """
    short = tl.minimum(place.columns, 1024).to(tl.int32)
    x = short - tl.minimum(place.columns - place.column, short).to(tl.int32) + at
    return tl.umulhi((2 * x).to(tl.uint32), place.inverse.to(tl.uint32)).to(tl.int32)


@triton.jit
def _product(x, y):
    """Of int32, as int64 in one instruction."""
    if assembly():
        return tl.inline_asm_elementwise("mul.wide.s32 $0, $1, $2;", "=l,r,r", [x, y], tl.int64, is_pure=True, pack=1)
    return x.to(tl.int64) * y


@triton.jit
def elements(A: tl.constexpr, B: tl.constexpr, V: tl.constexpr = 1):
    """Which element of its tile the first of each V neighbours is, int32 (A, B, 32 // V)."""
    last = tl.arange(0, 32 // V) * V
    return (tl.arange(0, A) * 32)[:, None, None] + (tl.arange(0, B) * (32 * A))[None, :, None] + last[None, None, :]


@triton.jit
def _to_each(x, A: tl.constexpr, B: tl.constexpr, V: tl.constexpr):
    """To each element, (A, B, 32), what ``x``, (A, B, 32 // V), has for the V neighbours that it is one of."""
    return tl.reshape(tl.broadcast_to(x[:, :, :, None], (A, B, 32 // V, V)), (A, B, 32))


@triton.jit
def _load(pointers, mask, A: tl.constexpr, B: tl.constexpr, N: tl.constexpr):
    """What is there, (A, B, N); 1 where the mask leaves it out.

    Where it can be a vector is loaded: pointers that show no neighbours would get another layout than the weights from Triton 3.6,
    and what is loaded go through shared memory.
    """
    if A == 1:
        return tl.reshape(tl.load(tl.reshape(pointers, (B * N,)), mask=tl.reshape(mask, (B * N,)), other=1), (A, B, N))
    else:
        return tl.load(pointers, mask=mask, other=1)


@triton.jit
def load_rows(pointer, place, mask, A: tl.constexpr, B: tl.constexpr, V: tl.constexpr, known=1):
    """What ``pointer`` has of each element's row, (A, B, 32); 1 if ``known`` is 0."""
    down = rows_down(place, elements(A, B, V)).to(tl.uint32).to(tl.int64)
    there = tl.full((A, B, 32 // V), known, tl.int64) != 0
    return _to_each(_load(pointer + place.line + down, there & mask if V == 1 else there, A, B, 32 // V), A, B, V)


@triton.jit
def load_columns(pointer, place, mask, A: tl.constexpr, B: tl.constexpr, V: tl.constexpr):
    """What ``pointer`` has of each element's column, (A, B, 32)."""
    at = elements(A, B, V)
    down = rows_down(place, at)
    if V == 1:
        return _load(pointer + (place.column + at - down * place.columns), mask, A, B, 32)
    # Addresses, so that one multiplication is left for V elements: all else is the same in a program or a thread.
    BYTES: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth // 8
    first = pointer.to(tl.int64) + place.column.to(tl.int64) * BYTES + at * BYTES
    first = _to_each(first + _product(down, place.columns * -BYTES), A, B, V).to(pointer.dtype)
    pointers = tl.max_contiguous(first + (tl.arange(0, 32) & (V - 1))[None, None, :], (1, 1, V))
    return tl.load(tl.multiple_of(pointers, (1, 1, min(V * BYTES, 16))))


@triton.jit
def scales_of(row, place, mask, A: tl.constexpr, B: tl.constexpr, V: tl.constexpr):
    """float32 scales (A, B, 32) of a tile; no row_scale, 0: a factor of 1."""
    rows, columns = row.row_scale.to(tl.pointer_type(tl.float32)), row.column_scale.to(tl.pointer_type(tl.float32))
    factor = load_rows(rows, place, mask, A, B, V, row.row_scale)
    return factor * load_columns(columns, place, mask, A, B, V)


@triton.jit
def pointer_to(address, start, at, TYPE: tl.constexpr, FORM: tl.constexpr, CAREFUL: tl.constexpr):
    """To the elements ``at`` of a tile that begins at element ``start``. With residuals ``start`` is added to the address: one
    addition, where to pointers it is one for each access.
    """
    BYTES: tl.constexpr = TYPE.primitive_bitwidth // 8
    if FORM.residual:
        pointer = (address + start * BYTES).to(tl.pointer_type(TYPE))
    else:
        pointer = address.to(tl.pointer_type(TYPE)) + start
    if not CAREFUL:  # an address from a table has no known alignment: the hint, on the pointer, gives 128-bit accesses
        pointer = tl.multiple_of(pointer, 8 if BYTES == 1 else 16)
    return pointer + at


@triton.jit
def loaded_from(pointer, mask, other, CAREFUL: tl.constexpr):
    """What is there; where CAREFUL, ``other`` for elements that the mask leaves out."""
    return tl.load(pointer, mask=mask, other=other) if CAREFUL else tl.load(pointer)
