"""The device table: what a program reads about its tensor, so that one launch serves any number of tensors."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .factored import lines_of
from .forms import TILE

# At most 62, the bits of ``_tiles``' mask (passes.py). The first loads of a program (row, scalars), about 1 us, are then
# under 5% of its time.
TILES = 32  # of a program
_ROW = 15  # int64 of a tensor, in the order of ``Row`` in passes.py
_CACHED = 1024  # tables kept: a shadow engine needs one a module; one is 120 bytes a tensor and 8 a run of tiles

_Key = tuple[Any, ...]
_tables: OrderedDict[_Key, tuple[Tensor, Tensor, Tensor, int]] = OrderedDict()


def tile_rows(
    src: Sequence[int], dst: Sequence[int], hessians: Sequence[int], residuals: Sequence[int], sizes: Sequence[int],
    offsets: Sequence[int], ids: Sequence[int], columns: Sequence[int], src_bytes: int, dst_bytes: int, residual_bits: int,
    factors: Sequence[tuple[int, int, int]] = (), widths: Sequence[int] = (),
) -> tuple[list[list[int]], list[tuple[int, int]], list[list[int]], int]:  # fmt: skip
    """Rows of the table and (row, first tile) of each program, from addresses and element counts; empty tensors left out.

    Addresses in a row are those of the element where the first tile starts, which may lie before the tensor's own first.
    ``factors``: what ``factors_of`` makes of the two scales of each tensor, or none. ``widths``: of factored noise, columns of the
    full tensors; then also the programs that make its signs, and how many words those of a step are.
    """
    rows: list[list[int]] = []
    runs: list[tuple[int, int]] = []
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
            tiles = -(-(shift + part) // TILE)
            runs += [(len(rows) - 1, tile) for tile in range(0, tiles, TILES)]
    return rows, runs, lines, words


def factors_of(row_scale: Tensor | None, column_scale: Tensor | None, end: int) -> tuple[int, int, int]:
    """Addresses of the two factors and the number of columns, 0 where there are none.

    A vector, all elements before ``end``, is one row of factor 1, at 0.
    """
    if row_scale is None or column_scale is None:
        return 0, 0, 0
    if n := column_scale.numel():
        return row_scale.data_ptr(), column_scale.data_ptr(), n
    return 0, row_scale.data_ptr(), -(-end // 8) * 8


def table_of(src: list[Tensor], dst: list[Tensor], hessians: list[Tensor], residuals: list[Tensor], offsets: list[int],
           ids: list[int], columns: list[int], device: torch.device,
           factors: Sequence[tuple[int, int, int]] = (), widths: Sequence[int] = ()) -> tuple[Tensor, Tensor, Tensor, int]:  # fmt: skip
    """The table on the device, made when these tensors are first seen: addresses and sizes are all it depends on."""
    addresses = [[t.data_ptr() for t in tensors] for tensors in (src, dst, hessians, residuals)]
    sizes = [t.numel() for t in src]
    bits = 8 * residuals[0].element_size() if residuals else 0
    kind = (device, src[0].dtype, dst[0].dtype, bits)
    key = (kind, *map(tuple, (*addresses, sizes, offsets, ids, columns, factors, widths)))
    if (found := _tables.get(key)) is not None:
        _tables.move_to_end(key)
        return found
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("zo_core: these tensors are new: run the pass once on them before capturing a CUDA graph")
    rows, runs, lines, words = tile_rows(
        addresses[0], addresses[1], addresses[2] or [0] * len(src), addresses[3] or [0] * len(src), sizes, offsets, ids,
        columns, src[0].element_size(), dst[0].element_size(), bits, factors, widths,
    )  # fmt: skip
    made = (
        torch.tensor(rows, dtype=torch.int64).view(-1, _ROW).to(device),
        torch.tensor(runs, dtype=torch.int32).view(-1, 2).to(device),
        torch.tensor(lines, dtype=torch.int64).to(device),
        words,
    )
    _tables[key] = made
    if len(_tables) > _CACHED:
        _tables.popitem(last=False)
    return made
