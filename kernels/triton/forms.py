"""The compiled forms of the pass and of gathered rows: ``form_of`` makes them for the launcher, and the lists are of all it can make."""

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

import triton.language as tl

TILE = 1024  # elements that a program makes at a time
MIN_SUMS = 5  # Rademacher streams from which on their sum is cheaper on the tensor cores (sums.py)

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
DISTRIBUTIONS = ("gaussian", "rademacher", "factored")
# Of the noise: none, 1/sqrt(H), the same while H changes, two factors, 1 / (root of a second moment of Gaussian noise + 1e-5)
SCALES = ("", "hessian", "update", "factors", "moment")


@dataclass(frozen=True)
class Form:
    """What the code of one compilation depends on; a compile-time argument of kernels and device functions."""

    distribution: str
    src: tl.dtype
    dst: tl.dtype
    scale: str = ""
    residual: int = 0  # bits
    keeps: bool = False  # writes residuals
    stochastic: bool = False  # rounds up with the probability of what truncation drops
    decay: bool = False
    streams: str = "one"  # "one"; "few": any number, in a loop; "sums": several at a time (sums.py, factored.py)

    @property
    def gaussian(self) -> bool:
        """Or made of signs."""
        return self.distribution == "gaussian"

    @property
    def shape(self) -> int:
        """Rows of 32 elements in which a thread has the elements of one Philox block: a tile is (shape, ..., 32)."""
        return 4 if self.distribution == "rademacher" else 1

    @property
    def factored(self) -> bool:
        """Noise of a matrix, made of signs of its rows and columns (factored.py)."""
        return self.distribution == "factored"

    @property
    def placed(self) -> bool:
        """Whether it makes a difference in which row and column an element is."""
        return self.factored or self.scale == "factors"

    @property
    def width(self) -> int:
        """Neighbours that a thread loads and stores at once, 128 bits of the narrower type."""
        return 4 if self.src == self.dst == tl.float32 else 8

    def neighbours(self, careful: bool) -> int:
        """Elements side by side of which is known that they are in one row; ``width`` where columns are a multiple of 8."""
        return 1 if careful else self.width

    def size(self, careful: bool) -> int:
        """Elements of a tile; where care is needed, which is seldom, few of them, for few registers."""
        return 128 if careful else TILE


def form_of(
    distribution: str, src: torch.dtype, dst: torch.dtype, scale: str, residual: int, in_place: bool, stochastic: bool,
    decay: bool, k: int,
) -> Form:  # fmt: skip
    """The form for a call with k streams, of factored noise terms: where arguments make no difference to the code, they make none to the form."""
    keeps = in_place and residual > 0
    stochastic = stochastic and dst != torch.float32 and not (keeps and residual == 16)
    sums = (distribution == "rademacher" and scale in ("", "factors") and k >= MIN_SUMS) or distribution == "factored"
    streams = "one" if k == 1 and scale != "moment" else "sums" if sums else "few"
    return Form(distribution, DTYPES[src], DTYPES[dst], scale, residual, keeps, stochastic, decay, streams)


def _forms(scales: tuple[str, ...], in_place: tuple[bool, ...], options: tuple[bool, ...]) -> list[Form]:
    """All forms of calls with these scales, in place or not, with these choices of stochastic rounding and decay."""
    calls = product(DISTRIBUTIONS, DTYPES, DTYPES, scales, (0, 8, 16), in_place, options, options, (0, 1, MIN_SUMS))
    found: dict[Form, None] = {}
    for distribution, src, dst, scale, residual, same, stochastic, decay, k in calls:
        possible = (src == dst or not same) and not (residual and src == torch.float32)
        writes = {"update": distribution != "factored", "moment": distribution == "gaussian"}  # only in place
        if possible and (scale not in writes or (same and writes[scale])):
            found[form_of(distribution, src, dst, scale, residual, same, stochastic, decay, k)] = None
    return list(found)


def pass_forms() -> list[dict[str, Any]]:
    """Compile-time arguments of the pass, in place and into other tensors."""
    return [{"FORM": f} for f in _forms(SCALES, (True, False), (False, True))]


def rows_forms() -> list[dict[str, Any]]:
    """Compile-time arguments of gathered rows: never in place, rounded to nearest, without decay."""
    return [{"FORM": f} for f in _forms(("", "hessian", "factors"), (False,), (False,))]
