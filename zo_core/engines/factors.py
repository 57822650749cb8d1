"""The signs of all matrices with factored noise, at all points of an evaluation."""

import math

import torch
from torch import Tensor

from ..bindings import ops
from ..kernels.reference import COLUMNS, ROWS, columns_of
from ..weights import ParamSpace

_ALIGNMENT = 16  # signs; those of a matrix begin at multiples of 32 bytes or more

Signs = tuple[Tensor, Tensor, Tensor, Tensor]  # of a matrix: rows (P, r, R), columns (P, r, C), and their transposes


class Factors:
    """Row and column signs of each matrix of a space: parts of one buffer, which one call fills.

    On a GPU that is one launch, where a few for each matrix take longer than the products of a short batch. Signs of rows are made times
    c r^-1/2 of their point, so that the product of both is the noise as it is added.
    """

    def __init__(self, space: ParamSpace) -> None:
        self._space, device = space, space.counters.device
        self.matrices: dict[int, tuple[slice, slice]] = {}  # by number: where the signs of rows and columns are
        parts, at = [], 0
        for i, (t, columns) in enumerate(zip(space.tensors, columns_of(space.tensors), strict=True)):
            if t.dim() != 2:
                continue
            place = []
            scaled = 1 + len(self.matrices) if space.scales else 1  # column of the coefficients below
            for domain, n, column in ((ROWS, len(t), scaled), (COLUMNS, columns, 0)):
                parts.append((domain, i, at, n, column))
                place.append(slice(at, at + n))
                at += -(-n // _ALIGNMENT) * _ALIGNMENT
            self.matrices[i] = place[0], place[1]
        self._make = ops.prepare_signs(device, parts)
        self._shape = space.rank, at
        with torch.inference_mode(False):
            self._one = torch.ones(1, dtype=torch.float32, device=device)
        # (points, r, at): those that are made in float32, and the same rounded to other dtypes for products in these.
        self._signs: dict[torch.dtype, Tensor] = {}
        self._current: set[torch.dtype] = set()  # dtypes whose signs are those of this evaluation
        self._views: dict[tuple[int, int, torch.dtype], Signs] = {}  # by points, matrix and dtype
        self._points = 0
        self.peak = 0  # bytes of the buffers, the most so far

    def bytes_of_a_point(self) -> int:
        """What the signs of one point take, in float32 and in a dtype of 16 bits."""
        return 6 * math.prod(self._shape)

    def clear(self) -> None:
        """Give the memory back, until the next call of ``make``."""
        self._signs, self._views, self._current = {}, {}, set()

    def make(self, streams: Tensor, cs: Tensor) -> None:
        """Make the signs of all matrices at these points: streams, int64 (P,), and the c of each tensor, float32 (P, T)."""
        self._points = len(cs)
        if self._signs and self._points > len(self._signs[torch.float32]):
            self.clear()
        self._current = set()
        signs = self._at_points(torch.float32)
        of_rows = cs[:, list(self.matrices)] if self._space.scales else cs[:, :1]
        coeffs = torch.cat((self._one.expand(len(cs), 1), of_rows * self._space.rank**-0.5), 1)
        self._make(signs, streams, coeffs, seed=self._space.seed)
        for i, row in self._space.padding.items():
            signs[..., self.matrices[i][0].start + row] = 0

    def of(self, i: int, dtype: torch.dtype) -> Signs:
        """The signs of matrix i in this dtype: of its rows times c r^-1/2, and of its columns."""
        if dtype not in self._current and dtype != torch.float32:
            self._at_points(dtype).copy_(self._at_points(torch.float32))
            self._current.add(dtype)
        key = self._points, i, dtype
        if (found := self._views.get(key)) is None:
            signs, (rows, columns) = self._at_points(dtype), self.matrices[i]
            a, b = signs[..., rows], signs[..., columns]
            found = self._views[key] = a, b, a.mT, b.mT
        return found

    def _at_points(self, dtype: torch.dtype) -> Tensor:
        """As much of the buffer of a dtype as there are points now. It has room for the most that there were."""
        if dtype not in self._signs:
            most = len(next(iter(self._signs.values()), self._one.expand(self._points)))
            with torch.inference_mode(False):
                self._signs[dtype] = self._one.new_empty(most, *self._shape, dtype=dtype)
            self.peak = max(self.peak, sum(t.nbytes for t in self._signs.values()))
        return self._signs[dtype][: self._points]
