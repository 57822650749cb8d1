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
_ROW = 14  # int64 of a tensor, in the order of ``Row`` in passes.py
_CACHED = 1024  # tables kept: a shadow engine needs one a module; one is 112 bytes a tensor and 8 a run of tiles

_Key = tuple[Any, ...]
_tables: OrderedDict[_Key, tuple[Tensor, Tensor, Tensor, int]] = OrderedDict()


def tile_rows(
    src: Sequence[int], dst: Sequence[int], hessians: Sequence[int], residuals: Sequence[int], sizes: Sequence[int],
    offsets: Sequence[int], ids: Sequence[int], columns: Sequence[int], src_bytes: int, dst_bytes: int, residual_bits: int,
    factors: Sequence[tuple[int, int, int]] = (), factored: bool = False,
) -> tuple[list[list[int]], list[tuple[int, int]], list[list[int]], int]:  # fmt: skip
    """Rows of the table and (row, first tile) of each program, from addresses and element counts; empty tensors left out.

    Where noise is ``factored`` also the programs that make its signs, and how many words those of a step are.

    Addresses in a row are those of the element where the first tile starts, which may lie before the tensor's own first.
    ``factors``: what ``factors_of`` makes of the two scales of each tensor, or none.
    """
    rows, runs, lines, words = [], [], [], 0
    for s, d, h, r, n, offset, tensor_id, column, (row_scale, column_scale, width) in zip(
        src, dst, hessians, residuals, sizes, offsets, ids, columns, factors or [(0, 0, 0)] * len(src), strict=True
    ):
        if not n:
            continue
        shift = offset % TILE
        s, d, h = s - shift * src_bytes, d - shift * dst_bytes, h - shift * 4 if h else 0
        r -= shift * residual_bits // 8
        aligned = s % 16 == d % 16 == h % 16 == r % (residual_bits or 1) == 0  # 8 elements of a residual are its bits
        aligned &= column_scale % 16 == width % 8 == 0 and width < 1 << 30
        rows.append([s, d, h, shift, shift + n, offset - shift, tensor_id, column * 2 + aligned, r])
        places = [0, 0]
        if factored:
            more, places, words = lines_of(width, offset, n, tensor_id, column, words)
            lines += more
        rows[-1] += [row_scale, column_scale, width, *places]
        tiles = -(-(shift + n) // TILE)
        runs += [(len(rows) - 1, first) for first in range(0, tiles, TILES)]
    return rows, runs, lines, words


def factors_of(row_scale: Tensor | None, column_scale: Tensor | None, columns: int, end: int) -> tuple[int, int, int]:
    """Addresses of the two factors, 0 for none, and how many columns they, or a matrix with factored noise, have.

    A vector, all elements before ``end``, is one row of factor 1, at 0.
    """
    if row_scale is None or column_scale is None:
        return 0, 0, columns
    n = column_scale.numel() or -(-end // 8) * 8
    if columns not in (0, n):
        raise ValueError(f"column_scales: expected as many numbers as factored noise has columns, {columns}, got {n}")
    return (row_scale.data_ptr(), column_scale.data_ptr(), n) if column_scale.numel() else (0, row_scale.data_ptr(), n)


def table_of(src: list[Tensor], dst: list[Tensor], hessians: list[Tensor], residuals: list[Tensor], offsets: list[int],
           ids: list[int], columns: list[int], device: torch.device,
           factors: Sequence[tuple[int, int, int]] = (), factored: bool = False) -> tuple[Tensor, Tensor, Tensor, int]:  # fmt: skip
    """The table on the device, made when these tensors are first seen: addresses and sizes are all it depends on."""
    addresses = [[t.data_ptr() for t in tensors] for tensors in (src, dst, hessians, residuals)]
    sizes = [t.numel() for t in src]
    bits = 8 * residuals[0].element_size() if residuals else 0
    kind = (device, src[0].dtype, dst[0].dtype, bits, factored)
    key = (kind, *map(tuple, (*addresses, sizes, offsets, ids, columns, factors)))
    if (found := _tables.get(key)) is not None:
        _tables.move_to_end(key)
        return found
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("zo_core: these tensors are new: run the pass once on them before capturing a CUDA graph")
    rows, runs, lines, words = tile_rows(
        addresses[0], addresses[1], addresses[2] or [0] * len(src), addresses[3] or [0] * len(src), sizes, offsets, ids,
        columns, src[0].element_size(), dst[0].element_size(), bits, factors, factored,
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
