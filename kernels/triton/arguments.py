"""What device functions are passed, by what it belongs to: a tensor, a stream, a tile, the whole pass.

Triton passes named tuples of device values as arguments and takes them apart when it compiles, so they cost nothing.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

ROW = tl.constexpr(15)  # int64 of a tensor in the table, see ``load_row``


class Row(NamedTuple):
    """What belongs to a tensor. Addresses, and the elements ``begin`` to ``end``, count from where its first tile starts."""

    src: Any
    dst: Any
    hessian: Any
    begin: Any
    end: Any
    first: Any  # index of the element where the first tile starts
    tensor_id: Any
    column: Any  # in the coefficients and the counters
    aligned: Any  # whole tiles can be read 128 bits at a time
    residual: Any
    row_scale: Any
    column_scale: Any
    columns: Any  # of the scales
    width: Any  # columns of factored noise, and where the signs of its row 0 and column 0 would be
    row_word: Any
    column_word: Any


@triton.jit
def load_row(at):
    """The row of the table there: the fields of ``Row`` in order, but that column and aligned share a word."""
    column = tl.load(at + 7)
    return Row(
        tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5),
        tl.load(at + 6).to(tl.uint32), column >> 1, (column & 1) != 0, tl.load(at + 8), tl.load(at + 9),
        tl.load(at + 10), tl.load(at + 11), tl.load(at + 12), tl.load(at + 13), tl.load(at + 14),
    )  # fmt: skip


class Place(NamedTuple):
    """Where the first element of a tile is in its matrix; of no use where a form is not ``placed``."""

    line: Any  # row, int64
    column: Any
    columns: Any
    inverse: Any  # of columns, or of 1,024 where they are more, for ``rows_down`` to multiply by


class Stream(NamedTuple):
    """A stream's number, and its coefficients in a tensor: in the noise, in what is taken back before, in the change of H or in the
    second moment.
    """

    number: Any
    c: Any
    restore: Any
    curvature: Any
    works: Any  # whether a coefficient is not zero


class Work(NamedTuple):
    """What the pass does to a tensor: factors of its weights and of its H, and the stream where there is one only."""

    keep: Any
    remain: Any
    only: Stream


class Key(NamedTuple):
    """What the noise of a tile depends on beside the stream: the index of its first element, its tensor, the seed's halves."""

    first: Any  # int64
    tensor_id: Any  # uint32, as all that follow
    k0: Any
    k1: Any


class Made(NamedTuple):
    """What a kernel before the pass makes for its sums over streams: pointers, and the number of steps, of so many streams each.

    ``digits_kernel`` (sums.py): digits of the coefficients, their totals and their units. ``signs_kernel`` (factored.py): words of
    signs, ``plane`` of them for a step, and sums of five terms.
    """

    digits: Any  # int8
    words: Any  # int32; of signs float32, or int16 for sums of five terms
    reals: Any  # float32
    n_steps: Any
    plane: Any  # int64


class Call(NamedTuple):
    """What belongs to the pass, the same for all tensors: pointers to scalars, one of each tensor or stream and tensor."""

    k0: Any
    k1: Any
    streams: Any
    coeffs: Any
    n_tensors: Any
    n_streams: Any
    made: Made
    counters: Any
    decay: Any = None
    update: Any = None
    restore: Any = None
    curvature: Any = None
    smoothing: Any = None
    hessian_min: Any = None
    hessian_max: Any = None
