"""The device table: what a program reads about its tensor, so that one launch serves any number of tensors."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import columns_of
from .arguments import ROW
from .factored import lines_of
from .forms import TILE, Form, form_of


class Table(NamedTuple):
    """A table on the device: a row for each tensor, the runs of tiles, and the programs that make signs of factored noise."""

    rows: Tensor
    runs: Tensor
    lines: Tensor
    words: int  # of signs that a step makes
    tiles: int  # of a program


class Tensors(NamedTuple):
    """Where the tensors of a pass are and what they are, without the tensors: a table and its form depend on nothing else.

    Addresses are 0 where a tensor has no Hessian or residual.
    """

    src: tuple[int, ...]
    dst: tuple[int, ...]
    hessians: tuple[int, ...]
    residuals: tuple[int, ...]
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    ids: tuple[int, ...]
    dtypes: tuple[tuple[torch.dtype, torch.dtype], ...]  # of src and dst
    bits: tuple[int, ...]  # of a residual
    factors: tuple[tuple[int, int, int], ...]  # see ``factors_of``
    widths: tuple[int, ...]  # columns that factored noise has, 0 for a vector

    @classmethod
    def of(
        cls, src: Sequence[Tensor], dst: Sequence[Tensor], hessians: Sequence[Tensor] = (), ids: Sequence[int] = (),
        offsets: Sequence[int] = (), residuals: Sequence[Tensor] = (), row_scales: Sequence[Tensor] = (),
        column_scales: Sequence[Tensor] = (), widths: Sequence[int] = (),
    ) -> "Tensors":  # fmt: skip
        """Of the arguments of ``bindings.ops``."""
        count = len(src)
        sizes, offsets, none = [t.numel() for t in src], offsets or [0] * count, [0] * count
        pairs = zip(row_scales, column_scales, strict=True) if row_scales else [(None, None)] * count
        given: Any = (
            [t.data_ptr() for t in src], [t.data_ptr() for t in dst], [t.data_ptr() for t in hessians] or none,
            [r.data_ptr() for r in residuals] or none, sizes, offsets, ids,
            [(s.dtype, d.dtype) for s, d in zip(src, dst, strict=True)],
            [8 * r.element_size() if r.numel() else 0 for r in residuals] or none,
            [factors_of(*pair, n + offset) for pair, n, offset in zip(pairs, sizes, offsets, strict=True)],
            widths or columns_of(src),
        )  # fmt: skip
        return cls(*map(tuple, given))

    @property
    def in_place(self) -> bool:
        """Whether every result is written where its weight was."""
        return self.src == self.dst

    def kinds(
        self, distribution: str, terms: tuple[int, int], scale: str, stochastic: bool, decay: bool
    ) -> dict[Form, list[int]]:
        """Numbers of the tensors that each form serves. ``terms``: of the noise of a matrix, and of a vector."""
        found: dict[Form, list[int]] = {}
        for i, ((src, dst), bits, width) in enumerate(zip(self.dtypes, self.bits, self.widths, strict=True)):
            vector = distribution == "factored" and not width
            name, k = ("rademacher", terms[1]) if vector else (distribution, terms[0])
            form = form_of(name, src, dst, scale, bits, self.in_place, stochastic, decay, k)
            found.setdefault(form, []).append(i)
        return found


def tile_rows(
    src: Sequence[int], dst: Sequence[int], hessians: Sequence[int], residuals: Sequence[int], sizes: Sequence[int],
    offsets: Sequence[int], ids: Sequence[int], columns: Sequence[int], src_bytes: int, dst_bytes: int, residual_bits: int,
    factors: Sequence[tuple[int, int, int]] = (), widths: Sequence[int] = (),
) -> tuple[list[list[int]], list[int], list[list[int]], int]:  # fmt: skip
    """Rows of the table and the number of tiles of each, from addresses and element counts; empty tensors left out.

    Addresses in a row are those of the element where the first tile starts, which may lie before the tensor's own first.
    ``factors``: what ``factors_of`` makes of the two scales of each tensor, or none. ``widths``: of factored noise, columns of the
    full tensors; then also the programs that make its signs, and how many words those of a step are.
    """
    rows: list[list[int]] = []
    tiles: list[int] = []
    lines: list[list[int]] = []
    words = 0
    of_tensors = zip(
        src, dst, hessians, residuals, sizes, offsets, ids, columns, factors or [(0, 0, 0)] * len(src),
        widths or [0] * len(src), strict=True,
    )  # fmt: skip
    for s, d, h, r, n, offset, tensor_id, column, (row_scale, column_scale, n_columns), width in of_tensors:
        # A part of a matrix that has fewer elements than a row, but of two rows: each by itself, for all columns may be many.
        inside = min(n, width - offset % width) if n < width else n
        for skipped, part in ((0, inside), (inside, n - inside)):
            if not part:
                continue
            first = offset + skipped
            shift = first % TILE
            back = skipped - shift
            at = [s + back * src_bytes, d + back * dst_bytes, h + back * 4 if h else 0, r + back * residual_bits // 8]
            # 8 elements of a residual are its bits
            aligned = at[0] % 16 == at[1] % 16 == at[2] % 16 == at[3] % (residual_bits or 1) == 0
            aligned &= column_scale % 16 == n_columns % 8 == width % 8 == 0 and max(n_columns, width) < 1 << 28
            places = 0, 0
            if width:
                programs, places, words = lines_of(width, first, part, tensor_id, column, words)
                lines += programs
            rows.append([*at[:3], shift, shift + part, first - shift, tensor_id, column * 2 + aligned, at[3]])
            rows[-1] += [row_scale, column_scale, n_columns, width, *places]
            tiles.append(-(-(shift + part) // TILE))
    return rows, tiles, lines, words


def tiles_of(form: Form) -> int:
    """Tiles of a program: the fastest of 1 to 62 on an H100 (62 is the bits of ``run_tiles``' mask).

    With few of them, programs that run at the same time are neighbours in memory, and end at about the same time. Where a
    program first loads what is the same for all of its tiles, more of them pay for that.
    """
    return 8 if form.streams == "sums" else 4 if form.factored else 2


def runs_of(tiles: Sequence[int], step: int) -> Tensor:
    """(row, first tile) of each program, int32 (programs, 2), of rows of so many tiles, ``step`` a program."""
    programs = torch.tensor(tiles, dtype=torch.int64).add_(step - 1).div_(step, rounding_mode="floor")
    row = torch.arange(len(tiles)).repeat_interleave(programs)
    first = torch.arange(len(row)) - (programs.cumsum(0) - programs)[row]
    return torch.stack((row, first * step), dim=1).to(torch.int32)


def factors_of(row_scale: Tensor | None, column_scale: Tensor | None, end: int) -> tuple[int, int, int]:
    """Addresses of the two factors and the number of columns, 0 where there are none.

    A vector, all elements before ``end``, is one row of factor 1, at 0.
    """
    if row_scale is None or column_scale is None:
        return 0, 0, 0
    if n := column_scale.numel():
        return row_scale.data_ptr(), column_scale.data_ptr(), n
    return 0, row_scale.data_ptr(), -(-end // 8) * 8


def table_of(tensors: Tensors, members: Sequence[int], form: Form, device: torch.device) -> Table:
    """The table of those tensors that a form serves, on the device.

    Raises:
        RuntimeError: a CUDA graph is being captured, which would copy what the host has in its memory then, at each replay.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("zo_core: these tensors are new: run the pass once on them before capturing a CUDA graph")
    selected: Any = ([x[i] for i in members] for x in tensors)
    of = Tensors(*selected)
    src, dst = of.dtypes[0]
    rows, tiles, lines, words = tile_rows(
        of.src, of.dst, of.hessians, of.residuals if form.residual else [0] * len(members), of.sizes, of.offsets, of.ids,
        members, src.itemsize, dst.itemsize, form.residual, of.factors, of.widths if form.factored else (),
    )  # fmt: skip
    return Table(
        torch.tensor(rows, dtype=torch.int64).view(-1, ROW.value).to(device),
        runs_of(tiles, tiles_of(form)).to(device),
        torch.tensor(lines, dtype=torch.int64).to(device),
        words,
        tiles_of(form),
    )
