"""Factored noise of a matrix, rank^-1/2 sum_q a_q(i) b_q(j): the signs of its rows i and columns j, and sums of their products.

``signs_kernel`` makes the signs once before a pass, for there are few of them, and leaves a word for each row and column. The pass
reads these and makes no random number. A *term* is the product of a stream's factor q: streams in order, and q in order within one.

One term: the word of a row is c a(i), and that of a column b(j), as float32. An element takes one multiplication and addition.

More terms: five at a time, whose sum has one of 32 values. Lane l of the warp holds the value in which term t is added where bit t of
l is 1, and subtracted where it is 0. A *step* is two fives, and a word, of 16 bits, has those of both: eight columns are one load of
128 bits. Rows have their bits inverted, so the XOR of the words of a row and a column has a 1 where their signs agree: its lowest five
bits are the lane that holds the sum of the first five, and the next five bits that of the second. So five terms take three instructions
(XOR or shift, SHFL, FADD), where term by term it would be three for each.
The terms of a five are added in their order, as the reference adds them, and so are the fives.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl

from ..reference import COLUMNS, ROWS
from .arguments import Key
from .launch import assembly, kernel, launch, on
from .noise import halves, signed, signs
from .places import load_columns, load_rows

_LINES = 1024  # rows or columns of a program


def _programs(domain: int, begin: int, end: int, at: int, tensor_id: int, column: int, right: bool) -> list[list[int]]:
    """Programs of ``signs_kernel`` for indices ``begin`` to ``end``; ``at``: where the word of index 0 would be.

    ``right``: of the right factor, which has neither coefficients nor inverted bits.
    """
    starts = range(begin - begin % _LINES, end, _LINES)
    return [
        [start, begin, end, at, tensor_id, column, domain << 24, right, right and start <= begin] for start in starts
    ]


def lines_of(
    columns: int, first: int, n: int, tensor_id: int, column: int = 0, at: int = 0
) -> tuple[list[list[int]], tuple[int, int], int]:
    """Programs for the rows and columns that elements ``first`` to ``first + n`` of a matrix are in, a row or all columns.

    Their words begin at ``at`` of a step's. Then where those of row 0 and column 0 would be, and where they end.
    """
    top, bottom, begin, end = first // columns, (first + n - 1) // columns + 1, 0, columns
    if bottom - top == 1:
        begin, end = first - top * columns, first - top * columns + n
    row_word, at = at - top, at + (bottom - top + 7) // 8 * 8
    column_word = at - begin // 8 * 8
    programs = _programs(ROWS, top, bottom, row_word, tensor_id, column, False)
    programs += _programs(COLUMNS, begin, end, column_word, tensor_id, column, True)
    return programs, (row_word, column_word), column_word + (end + 7) // 8 * 8


@lru_cache(maxsize=256)
def lines_on(device: torch.device, *of: int) -> tuple[Tensor, tuple[int, int], int]:
    """``lines_of`` one matrix, with the programs on the device."""
    programs, places, end = lines_of(*of)
    return torch.tensor(programs, dtype=torch.int64).to(device), places, end


@kernel(warps=4, forms=lambda: [{"ONE": True}, {"ONE": False}])
def signs_kernel(
    table, streams, coeffs, words, reals, n_tensors, n_terms, rank, root, n_steps, plane, k0, k1, ONE: tl.constexpr
):
    """Words of up to 1,024 rows or columns of a matrix, as ``table`` says, those of the next term or step ``plane`` further.

    One program of a matrix also makes its sums of five terms, ``reals`` (n_tensors, n_steps, 2, 32).
    """
    at = table + tl.program_id(0).to(tl.int64) * 9
    first, column, above, right = tl.load(at), tl.load(at + 5), tl.load(at + 6).to(tl.uint32), tl.load(at + 7)
    key = Key(first, tl.load(at + 4).to(tl.uint32), k0.to(tl.uint32), k1.to(tl.uint32))
    bit = tl.arange(0, 32)[None, None, :]
    index = first + (tl.arange(0, 4) * 32)[:, None, None] + (tl.arange(0, 8) * 128)[None, :, None] + bit
    mask = (index >= tl.load(at + 1)) & (index < tl.load(at + 2))
    words = words.to(tl.pointer_type(tl.float32 if ONE else tl.int16), bitcast=True) + tl.load(at + 3) + index
    coeffs += column
    if ONE:
        for term in range(n_terms):
            stream = tl.load(streams + term // rank).to(tl.uint32)
            c = tl.where(right != 0, 1.0, tl.load(coeffs + term // rank * n_tensors))
            z = signed(signs(key, stream, 8, above | ((term % rank).to(tl.uint32) << 8)), c, (4, 8, 32))
            tl.store(words + term * plane, z, mask=mask)
    else:
        lane = tl.arange(0, 32)
        for step in range(n_steps):
            word = tl.zeros((4, 8, 32), tl.uint32)
            for t in range(10):
                term = step * 10 + t
                stream = tl.load(streams + term // rank, mask=term < n_terms, other=0).to(tl.uint32)
                s = signs(key, stream, 8, above | ((term % rank).to(tl.uint32) << 8))
                word |= ((s >> bit.to(tl.uint32)) & 1) << t
            if right == 0:
                word ^= 0xFFFFFFFF
            tl.store(words + step * plane, word.to(tl.int16), mask=mask)
            if tl.load(at + 8) != 0:
                for five in range(2):
                    total = tl.zeros((32,), tl.float32)
                    for t in range(5):
                        term = step * 10 + five * 5 + t
                        c = tl.load(coeffs + term // rank * n_tensors, mask=term < n_terms, other=0.0) * root
                        minus = (((lane >> t) & 1) ^ 1).to(tl.uint32) << 31
                        total += (c.to(tl.uint32, bitcast=True) ^ minus).to(tl.float32, bitcast=True)
                    tl.store(reals + ((column * n_steps + step) * 2 + five) * 32 + lane, total)


# From the words of the rows and columns of two elements, and what this lane holds for either five: it is the same for both elements.
# A shuffle looks at the lowest five bits of the number of a lane; ``tl.gather`` would set all others to 0 before, and each shift would
# be of one element (2 to 3 instructions a weight more).
_SHUFFLES = tl.constexpr("""{
.reg .b32 x, y, a, b;
xor.b32 x, $2, $3;
shr.u32 y, x, 16;
shfl.sync.idx.b32 $0, $4, x, 31, -1;
shfl.sync.idx.b32 $1, $4, y, 31, -1;
shr.u32 x, x, 5;
shr.u32 y, y, 5;
shfl.sync.idx.b32 a, $6, x, 31, -1;
shfl.sync.idx.b32 b, $6, y, 31, -1;
add.rn.f32 $0, $0, a;
add.rn.f32 $1, $1, b;
}""")


@triton.jit
def _sum_of_fives(reals, a, b, A: tl.constexpr, B: tl.constexpr):
    """The sum of two fives for each element (A, B, 32), from the words of its row and column."""
    if assembly():
        # What a lane holds is a scalar to Triton, though it differs from lane to lane.
        reals += tl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r", [], tl.int32, is_pure=True, pack=1)
        first, second = tl.broadcast_to(tl.load(reals), (A, B, 32)), tl.broadcast_to(tl.load(reals + 32), (A, B, 32))
        return tl.inline_asm_elementwise(_SHUFFLES, "=&r,=&r,r,r,r,r,r,r", [a, b, first, second], tl.float32, True, 2)
    else:
        reals += tl.arange(0, 32)
        lanes = tl.reshape(a ^ b, (A * B * 32,))
        first, second = tl.gather(tl.load(reals), lanes & 31, 0), tl.gather(tl.load(reals + 32), (lanes >> 5) & 31, 0)
        return tl.reshape(first + second, (A, B, 32))


@triton.jit
def _step(step, row, place, mask, made, A: tl.constexpr, B: tl.constexpr, V: tl.constexpr):
    """The sum of ten terms: of five and five."""
    words = made.words.to(tl.pointer_type(tl.int16), bitcast=True) + step * made.plane
    a = load_rows(words + row.row_word, place, mask, A, B, V)
    b = load_columns(words + row.column_word, place, mask, A, B, V)
    return _sum_of_fives(made.reals + (row.column * made.n_steps + step) * 64, a, b, A, B)


@triton.jit
def products(row, place, mask, made, B: tl.constexpr, FORM: tl.constexpr, CAREFUL: tl.constexpr):
    """The noise of all terms in a tile (A, B, 32), float32."""
    A: tl.constexpr = FORM.shape
    V: tl.constexpr = FORM.neighbours(CAREFUL)
    if FORM.streams == "one":
        words = made.words.to(tl.pointer_type(tl.float32), bitcast=True)
        a = load_rows(words + row.row_word, place, mask, A, B, V)
        return a * load_columns(words + row.column_word, place, mask, A, B, V)
    else:
        noise = _step(0, row, place, mask, made, A, B, V)
        for step in range(1, made.n_steps):
            noise += _step(step, row, place, mask, made, A, B, V)
        return noise


def signs_of(lines: Tensor, plane: int, streams: Tensor, coeffs: Tensor, rank: int, seed: int) -> dict[str, Any]:
    """The words and sums of matrices (K, T) whose programs are ``lines``, as kernels take them."""
    (k, count), steps = coeffs.shape, max(-(-streams.numel() * rank // 10), 1)
    one = k * rank == 1
    made = {
        "words": torch.empty(steps * plane, dtype=torch.float32 if one else torch.int16, device=coeffs.device),
        "reals": torch.empty(count * steps * 64, dtype=torch.float32, device=coeffs.device),
        "n_steps": steps,
        "plane": plane,
    }
    _launch(lines, streams, coeffs, rank, seed, **made, ONE=one)
    return made


def signs_(signs: Tensor, streams: Tensor, *, domain: int, tensor_id: int, seed: int) -> None:
    """Fill float32 ``signs`` (K, rank, n) with the signs of a domain at indices 0 to n - 1: of stream k and factor q at [k, q]."""
    one = torch.ones(len(signs), 1, dtype=torch.float32, device=signs.device)
    prepare_signs(signs.device, [(domain, tensor_id, 0, signs.shape[2], 0)])(signs, streams, one, seed=seed)


def prepare_signs(device: torch.device, parts: Sequence[tuple[int, int, int, int, int]]) -> Callable[..., None]:
    """``prepare_signs`` of ``bindings.ops``: one launch for all parts."""
    programs = [_programs(domain, 0, n, at, i, column, False) for domain, i, at, n, column in parts]
    lines = torch.tensor([line for part in programs for line in part], dtype=torch.int64).to(device)

    def run(out: Tensor, streams: Tensor, coeffs: Tensor, *, seed: int) -> None:
        if len(lines) and out.numel():
            with on(device):
                _launch(
                    lines, streams, coeffs, out.shape[1], seed, words=out, reals=coeffs, n_steps=0, plane=out.shape[2], ONE=True
                )  # fmt: skip

    return run


def _launch(lines: Tensor, streams: Tensor, coeffs: Tensor, rank: int, seed: int, **more: Any) -> None:
    k, count = coeffs.shape
    launch(
        signs_kernel, len(lines), table=lines, streams=streams, coeffs=coeffs, n_tensors=count, n_terms=k * rank, rank=rank,
        root=rank**-0.5, **halves(seed), **more,
    )  # fmt: skip
