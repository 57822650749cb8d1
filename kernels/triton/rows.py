"""Gathered rows: an embedding reads few rows of its matrix, so only these are perturbed, into a small matrix of their own."""

from torch import Tensor

import triton.language as tl

from .arguments import Call, Made, Row
from .factored import lines_on, signs_of
from .forms import TILE, form_of, rows_forms
from .gate import gate
from .launch import kernel, launch, on
from .noise import halves
from .passes import run_tiles
from .sums import digits_of
from .table import factors_of


@kernel(warps=1, forms=rows_forms)
def rows_kernel(
    src, rows, dst, residual, hessian, row_scale, column_scale, columns, row_word, column_word, go, n_tiles, width, tensor_id,
    offset, k0, k1, streams, coeffs, n_streams, digits, words, reals, n_steps, plane, counters, FORM: tl.constexpr,
):  # fmt: skip
    """A program makes one tile of one gathered row: a row is a tensor that starts at its own offset in the matrix."""
    TILE: tl.constexpr = FORM.size(False)
    j = (tl.program_id(0) // n_tiles).to(tl.int64)
    t = (tl.program_id(0) % n_tiles).to(tl.int64)
    source = tl.load(rows + j)
    at = offset.to(tl.int64) + source * width
    shift = at % TILE
    src_at = src.to(tl.int64) + (source * width - shift) * (FORM.src.primitive_bitwidth // 8)
    dst_at = dst.to(tl.int64) + (j * width - shift) * (FORM.dst.primitive_bitwidth // 8)
    rest_at = residual.to(tl.int64) + (source * width - shift) * (FORM.residual // 8)
    zero = tl.full((), 0, tl.int64)
    scale_at = hessian.to(tl.int64) + (source * width - shift) * 4 if FORM.scale == "hessian" else zero
    column_scale, columns = column_scale.to(tl.int64), columns.to(tl.int64)
    wide = width.to(tl.int64) if FORM.factored else zero
    aligned = ((src_at | dst_at | scale_at | column_scale | ((columns | wide) & 7)) & 15) == 0
    aligned = aligned & ((rest_at & (FORM.residual - 1 if FORM.residual else 0)) == 0)
    aligned = aligned & (tl.maximum(columns, wide) < 1 << 28)
    row = Row(
        src_at, dst_at, scale_at, shift, shift + width, at - shift, tensor_id.to(tl.uint32), zero, aligned, rest_at,
        row_scale.to(tl.int64), column_scale, columns, wide, row_word.to(tl.int64), column_word.to(tl.int64),
    )  # fmt: skip
    call = Call(
        k0.to(tl.uint32), k1.to(tl.uint32), streams, coeffs, 1, n_streams,
        Made(digits, words, reals, n_steps, plane), counters,
    )  # fmt: skip
    if (tl.load(go) != 0) & (t * TILE < shift + width):
        run_tiles(row, t, t + 1, call, FORM)


def run_rows(
    src: Tensor, rows: Tensor, dst: Tensor, tensor_id: int, offset: int, streams: Tensor, coeffs: Tensor, *, seed: int,
    distribution: str, counters: Tensor, residual: Tensor | None = None, hessian: Tensor | None = None,
    row_scale: Tensor | None = None, column_scale: Tensor | None = None, rank: int = 1,
) -> None:  # fmt: skip
    """``perturb_rows`` of ``bindings.ops``, arguments already checked: rows of ``src`` that ``rows`` names, into the rows of ``dst``."""
    if not dst.numel():
        return
    k, width, coeffs = streams.numel(), src.shape[1], coeffs.contiguous()
    bits = 8 * residual.element_size() if residual is not None and residual.numel() else 0
    scale = "hessian" if hessian is not None else "factors" if row_scale is not None else ""
    factors = factors_of(row_scale, column_scale, offset + src.numel())
    form = form_of(distribution, src.dtype, dst.dtype, scale, bits, False, False, False, k * rank)
    tiles = -(-width // TILE) + 1  # a row may start anywhere in its first tile
    with on(src.device):
        made = {**dict.fromkeys(("digits", "words", "reals"), coeffs), "n_steps": 0, "plane": 0}  # read by sums alone
        places = 0, 0
        if form.factored:
            lines, places, plane = lines_on(src.device, width, offset, src.numel(), tensor_id)
            made |= signs_of(lines, plane, streams, coeffs, rank, seed)
        elif form.streams == "sums":
            made |= digits_of(coeffs)
        launch(
            rows_kernel, rows.numel() * tiles, src=src, rows=rows, dst=dst, residual=residual if bits else coeffs,
            hessian=coeffs if hessian is None else hessian, row_scale=factors[0], column_scale=factors[1],
            columns=factors[2], row_word=places[0], column_word=places[1], go=gate(coeffs, counters, moves=True), n_tiles=tiles, width=width, tensor_id=tensor_id,
            offset=offset, **halves(seed), streams=streams, coeffs=coeffs, n_streams=k,
            **made, counters=counters, FORM=form,
        )  # fmt: skip
