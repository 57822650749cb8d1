"""All points of a step in one call of the closure, under ``torch.vmap`` over the points.

Parameters answer as they do to the shadow engine; what they answer is a value for each point. Activations then have a
dimension for the points, which torch carries through the closure unseen.

A matrix with factored noise is never copied: (W + c z) x = W x + c r^-1/2 sum_q a_q (b_q . x), so W is read once for all
points, in one product over the rows of all of them, and each point adds a product of rank r. All else (vectors, other
noise, matrices that are read otherwise than to be multiplied) is a batch of perturbed copies, made in one pass.

The weight in such a product is rounded to its dtype, as in a plain forward: a residual does not come into it, nor is
W + c z rounded, as it is in the shadow engine's copies.
"""

import dis
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.nn import functional

from ..bindings.warn import warn
from ..weights import ParamSpace, Point
from .base import uninterrupted
from .factors import Factors
from .folds import batched, fold_attention, points_first, unseen
from .intercept import UNTRACEABLE, Interception
from .shadow import ShadowEngine
from .structure import GROUP, Plan, groups

_ROWS = {"cpu": 1024}  # that a matrix is multiplied by at once, from where on more make it no faster
_MANY_ROWS = 1 << 16  # of other devices
_SINGLY = {"cpu": 512}  # rows of one point from where on bfloat16 is faster one point after the other
# Of a loss, by what copies are rounded to. One unit of a logit in bfloat16 is 5% of the loss of a single example.
_ROUNDING = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_OURS = (Path(torch.__file__).parent, Path(__file__).parent.parent)  # whose lines are not the closure's
# What torch says where a function cannot be batched, in words that all versions since 2.4 have.
_UNBATCHED = (
    "vmap",
    "functorch",
    "batching rule",
    "doesn't have storage",
    "torch.func",
    "doesn't match the broadcast shape",  # an in-place function of a tensor that is the same at all points
    UNTRACEABLE,
)


class GroupedEngine(ShadowEngine):
    """Evaluates at all points of a step at once.

    What cannot be evaluated so is left to the shadow engine, which this one is a kind of, from then on: a closure that
    torch cannot batch (``item``, branches on values, writes into tensors that are not batched), modules that are compiled or
    scripted, or that write their buffers. A warning names the reason and the line. The first points are evaluated
    both ways, and a difference beyond rounding has the same consequence.

    Args:
        space: the trained tensors.
        module: whose forwards use them.
        points_at_once: at most; None: as many as fill the processor with rows, and fit in memory.
        named: whether the user named this engine. If not, the shadow engine evaluates where it is faster (docs/engines.md).
    """

    def __init__(
        self, space: ParamSpace, module: nn.Module, points_at_once: int | None = None, named: bool = True
    ) -> None:
        super().__init__(space, module)
        self.points_at_once, self.named = points_at_once, named
        self.fallback: str | None = None  # why the shadow engine evaluates, where it does
        self._known = False  # whether losses were compared
        self._singly = False  # whether the shadow engine evaluates as it is faster
        self._most: int | None = None  # points at once that memory was found to hold
        self._widest = 0  # bytes of the largest product so far, of one point
        self._copied: dict[int, torch.dtype] = {}  # tensors that were copied for several points, and their dtypes
        self._factors = Factors(space) if space.distribution == "factored" and not space.hessian else None
        self._whole: list[int] = []  # of the copied tensors, matrices with factors
        # Frozen matrices are multiplied by rows of all points at once too: torch copies some of them for each point.
        frozen = [
            p for p in module.parameters() if id(p) not in self._numbers and type(p) is nn.Parameter and p.dim() == 2
        ]
        frozen = [p for p in frozen if p.layout is torch.strided and p.is_floating_point()]
        self._frozen = [p for p in frozen if p.device == self.device]
        self._module_bytes = sum(p.numel() * p.itemsize for p in module.parameters())  # sparse ones have no nbytes
        self._interception = Interception(space, self, self._frozen)
        self._plans: dict[int, Plan] = {}  # by the number of points
        self._shadow_plan = self._plan  # of the shadow engine
        # Of the evaluation that runs, for each point: its stream, and the coefficient of each tensor
        self._streams, self._cs = self._clean, space.full(0)
        fold_attention()

    # ---- the engine --------------------------------------------------------------------------------------------

    def evaluate_all(
        self, closure: Callable[[], Tensor], points: Sequence[Point], leave_out: Collection[int] = ()
    ) -> Tensor:
        """The closure's results at all of these points, (n,)."""
        why = ""
        if self.fallback is None and not self._singly:
            try:
                if self._known or self._agrees(closure, points[:2], leave_out):
                    return self._in_chunks(closure, points, leave_out)
            except Exception as error:
                if not _unbatched(error):
                    raise
                why = _reason(error)
        try:
            found = super().evaluate_all(closure, points, leave_out)  # which raises what is the closure's own
        except RuntimeError as error:
            if why and "escaped" in str(error):
                raise RuntimeError(
                    "engine='grouped': the closure uses a tensor that it stored in an earlier call, where it stood for several points "
                    "at once: store nothing that depends on the weights, use what step returns, or give engine='shadow'"
                ) from error
            raise
        if why:
            self._leave(why)
        return found

    def settle(self) -> None:
        """Leave the evaluations of a step to the shadow engine if it is faster by the largest product so far, and the choice is ours."""
        long = self.rows >= _SINGLY.get(self.device.type, sys.maxsize)
        ours = not self.named and not self._frozen and all(t.dtype is torch.bfloat16 for t in self.space.tensors)
        self._singly = long and ours

    def restore(self) -> None:
        """End an evaluation, wherever it was left: parameters are theta again."""
        super().restore()
        self._interception.level, self._plan = None, self._shadow_plan

    def memory(self) -> dict[str, int]:
        """As the shadow engine's, and bytes of the signs of factored matrices, the most so far."""
        return super().memory() | ({"signs": self._factors.peak} if self._factors else {})

    def _clear(self) -> None:
        """Give memory back that evaluations may not need again."""
        self._scratch.buffers.clear()
        if self._factors:
            self._factors.clear()

    def _leave(self, reason: str) -> None:
        """Leave all further evaluations to the shadow engine."""
        self.fallback = reason
        self._clear()
        warn(
            f"engine='grouped': the closure cannot be evaluated at several points at once: {reason}. The shadow engine "
            "evaluates it from now on, at one point after the other",
        )

    def _agrees(self, closure: Callable[[], Tensor], points: Sequence[Point], leave_out: Collection[int]) -> bool:
        """Whether the first points have the losses that the shadow engine finds; not known while these are not finite."""
        if not (why := self._elsewhere()):
            rows = self.rows
            grouped = self._at(closure, points, leave_out)
            self.rows = rows or self.rows  # a run that goes on from its state goes on as if it had not been interrupted
            singly = super().evaluate_all(closure, points, leave_out)
            if not (why := self._elsewhere()) and getattr(getattr(closure, "buffers", None), "moving", False):
                why = "its modules write their buffers"
            elif not why and singly.isfinite().all():
                most = max(self._rounding(dtype) for dtype in {torch.float32, *self._shadow_plan.dtypes.values()})
                apart, size = (grouped - singly).abs(), singly.abs() + (singly - singly[0]).abs()
                self._known = bool((apart <= most * size + 1e-7).all())
                if not self._known:
                    why = f"its losses are {grouped.tolist()} then, and {singly.tolist()} at one point at a time"
        self._scratch.buffers.clear()  # the shadow engine's copies of matrices, which may not be needed again
        if why:
            self._leave(why)
        self.settle()
        return self._known and not self._singly

    def _rounding(self, dtype: torch.dtype) -> float:
        """How far losses of weights in this dtype may be apart, relatively. TF32's products have as many digits as float16's."""
        if (
            dtype is torch.float32
            and self.device.type == "cuda"
            and torch.backends.cuda.matmul.fp32_precision == "tf32"
        ):
            dtype = torch.float16
        return _ROUNDING.get(dtype, 0.0)

    def _elsewhere(self) -> str:
        """Why several points cannot be evaluated at once where the module's parameters are read by other code than torch's functions."""
        if self._swapped or self._regions:
            return "parameters are read by compiled or scripted code, by an extension or as a class of their own"
        return ""

    def _in_chunks(self, closure: Callable[[], Tensor], points: Sequence[Point], leave_out: Collection[int]) -> Tensor:
        """Results at all points, as many at once as there is room for, in parts of about one size."""
        parts = -(-len(points) // self._at_once())
        size = -(-len(points) // parts)
        try:
            return torch.cat([self._at(closure, points[i : i + size], leave_out) for i in range(0, len(points), size)])
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error) or self._most is not None or size == 1:
                raise
        self._most = size // 2  # outside of the handler, where the error still holds what the closure had made
        self._clear()
        warn(
            f"engine='grouped': out of memory with {size} points at once, from now on there are {self._most} "
            "(points_at_once sets it)",
        )
        return self._in_chunks(closure, points, leave_out)

    def _at_once(self) -> int:
        """How many points are evaluated at once, at most."""
        most = self._most or sys.maxsize
        if self.points_at_once is not None:
            return min(self.points_at_once, most)
        enough = _ROWS.get(self.device.type, _MANY_ROWS) // max(1, self.rows)
        signs = self._factors.bytes_of_a_point() if self._factors else 0
        memory = _free_memory(self.device) // 2 // max(1, 16 * self._widest + signs)
        copied = [self.space.tensors[i].numel() * dtype.itemsize for i, dtype in self._copied.items()]
        room = max(2 * GROUP, self._module_bytes // 20) // (2 * max(copied, default=1))
        return max(1, min(enough, memory, room, most))

    def _at(self, closure: Callable[[], Tensor], points: Sequence[Point], leave_out: Collection[int]) -> Tensor:
        """Results of one call of the closure, at all of these points."""
        outside = _functorch.maybe_current_level()

        def one(_: Tensor) -> Tensor:
            self._interception.level = _functorch.maybe_current_level()
            return closure()

        try:
            with uninterrupted():
                self._begin_at(points, leave_out)
            found = torch.vmap(one, randomness="same")(self._cs)
            self._refuse_writes()
            return found
        finally:
            with uninterrupted():
                while _functorch.maybe_current_level() != outside:  # a signal came where vmap could not undo its own
                    _functorch._vmap_decrement_nesting()
                self.restore()

    def _begin_at(self, points: Sequence[Point], leave_out: Collection[int]) -> None:
        """Let parameters answer with their values at these points."""
        self._begin(0.0, self._clean, leave_out, hide=False)
        self._plan = self._plan_of(len(points))
        known, plain = len(self._sources), [i for i in self._left_out if self._sources[i].dim() == 2]
        self._sources += [p.data for p in self._frozen]
        self._interception.start([*plain, *range(known, len(self._sources))])
        self._streams = torch.cat([self._clean if probe is None else probe for _, probe in points])
        cs = [0.0 if probe is None else c for c, probe in points]
        self._cs = torch.tensor(cs, dtype=torch.float32, device=self.device).unsqueeze(1) * self.space.full(1.0)
        if self._factors:
            self._factors.make(self._streams, self._cs)

    def _plan_of(self, n: int) -> Plan:
        """Groups of what is copied for n points: all vectors of a model are few bytes."""
        factored = self._factors.matrices if self._factors else ()
        if (whole := [i for i in self._copied if i in factored]) != self._whole:
            self._whole, self._plans = whole, {}
        if n not in self._plans:
            sizes = [0 if i in factored and i not in whole else t.nbytes for i, t in enumerate(self.space.tensors)]
            self._plans[n] = Plan(groups(self.module, self.space.tensors, GROUP // n, sizes), (n,))
            self._plans[n].dtypes = self._copied
        return self._plans[n]

    def _perturb(self, make: Callable[..., None], which: Sequence[int], sources: list[Tensor]) -> None:
        """Write theta + c z of these tensors, at all points, where ``make`` was prepared for."""
        if not (lead := self._plan.lead):
            return super()._perturb(make, which, sources)
        n = len(which)
        with unseen():
            coeffs = self._cs[:, list(which)] if self.space.scales else self._cs[:, :n]
            make(sources, self._streams, coeffs, self._uncounted.new_empty(1 + n * lead[0]))

    # ---- what a read answers -----------------------------------------------------------------------------------

    def read(self, i: int, dtype: torch.dtype | None = None, keep: bool = False) -> Tensor:
        """Tensor i at all points, batched, in this dtype or its own."""
        if (level := self._interception.level) is None:
            return super().read(i, dtype, keep)
        if self._is_plain(i):
            return self._sources[i].detach()
        with self._lock:
            return batched(self._copy((i, dtype or self._sources[i].dtype)).detach(), level)

    def _is_plain(self, i: int) -> bool:
        """Whether a tensor is the same at all points: frozen, or left out of this step."""
        return i >= len(self.space.tensors) or i in self._left_out

    def product(self, i: int, x: Tensor, dtype: torch.dtype | None, transposed: bool, bias: Any) -> Tensor | None:
        """X times matrix i, or its transpose, plus a bias if there is one, batched; None if x is not of its kind."""
        level, source, shape = self._interception.level, self._sources[i], x.shape
        assert level is not None
        if source.dim() != 2 or not shape or shape[-1] != source.shape[1 if transposed else 0]:
            return None
        raw, plain = points_first(x, level), self._is_plain(i)
        if plain and raw is None:
            return None
        if isinstance(bias, int | Tensor):
            if (self._sources[bias] if isinstance(bias, int) else bias).dim() != 1:
                return None
            if isinstance(bias, Tensor) and (raw_bias := points_first(bias, level)) is not None:
                bias = raw_bias
        with self._lock, unseen():
            y = self._multiplied(i, x if raw is None else raw, raw is not None, dtype or source.dtype, transposed, bias)
            y = y.view(y.shape[0], *shape[:-1], y.shape[2])
        return batched(y, level)

    def _multiplied(self, i: int, x: Tensor, differs: bool, dtype: torch.dtype, transposed: bool, bias: Any) -> Tensor:
        """The product at all points, (P, rows, columns). Of x the first dimension counts points, if it ``differs`` among them."""
        points, n, plain = self._plan.lead[0], x.shape[-1], self._is_plain(i)
        rows = (x if x.dtype is dtype else x.to(dtype)).reshape(-1, n)
        each = rows.view(points, -1, n) if differs else rows.expand(points, *rows.shape)
        if isinstance(bias, int):
            bias = self._sources[bias] if self._is_plain(bias) else self._copy((bias, dtype))
        if isinstance(bias, Tensor):
            bias = (bias if bias.dim() == 1 else bias.unsqueeze(1)).to(dtype)
        matrix = turned(self._sources[i].to(dtype), transposed) if plain or self._factors else None
        if plain and matrix is not None:
            y = torch.mm(rows, matrix).view(points, -1, matrix.shape[1])
            y = y if bias is None else y.add_(bias)
        else:
            if self._factors:  # c r^-1/2 sum_q a_q (b_q . x) first, so that W x is rounded once, with all of the sum
                a, b, a_turned, b_turned = self._factors.of(i, dtype)
                left, right = (b_turned, a) if transposed else (a_turned, b)
                left = torch.bmm(each, left)
            else:
                left, right = each, turned(self._copy((i, dtype)), transposed)
            y = torch.bmm(left, right) if bias is None else torch.baddbmm(bias, left, right)
            if matrix is not None and differs:
                y.view(-1, y.shape[2]).addmm_(rows, matrix)
            elif matrix is not None:
                y.add_(torch.mm(rows, matrix))
        self.rows, self._widest = max(self.rows, y.shape[1]), max(self._widest, y.nbytes // points)
        return y

    def read_rows(self, i: int, index: Tensor) -> Tensor:
        """Rows of matrix i at all points, as an embedding returns them: (*index.shape, columns), batched."""
        if (level := self._interception.level) is None:
            return super().read_rows(i, index)
        source = self._sources[i]
        if self._is_plain(i):
            return functional.embedding(index, source)
        if points_first(index, level) is not None:
            return functional.embedding(index, self.read(i))
        with self._lock, unseen():
            if self._factors:
                a, b, *_ = self._factors.of(i, source.dtype)
                flat = index.reshape(-1)
                out = torch.baddbmm(functional.embedding(flat, source), a.index_select(2, flat).mT, b)
                out = out.view(-1, *index.shape, source.shape[1])
            else:
                out = torch.empty(len(self._cs), *index.shape, source.shape[1], dtype=source.dtype, device=self.device)
                for copy, stream, c in zip(out, torch.split(self._streams, 1), self._cs[:, i], strict=True):
                    self._look_up(i, index, copy, stream, c.view(1, 1))
        return batched(out, level)


def turned(matrix: Tensor, transposed: bool) -> Tensor:
    """The matrix, or its transpose."""
    return matrix.mT if transposed else matrix


def _unbatched(error: Exception) -> bool:
    """Whether torch may have raised this because it cannot batch something. Python code's own ``raise`` is not torch's."""
    if _out_of_memory(error):
        return False
    if any(words in str(error).lower() for words in _UNBATCHED):
        return True
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    raised = at is not None and dis.opname[at.tb_frame.f_code.co_code[at.tb_lasti]] == "RAISE_VARARGS"
    return isinstance(error, RuntimeError | ValueError | TypeError | IndexError) and not raised


def _reason(error: Exception) -> str:
    """What an error says, and where in the closure it was raised."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not Path(f.filename).is_relative_to(_OURS[0])]
    frames = [f for f in frames if not Path(f.filename).is_relative_to(_OURS[1])]
    where = f"{frames[-1].filename}, line {frames[-1].lineno}, `{frames[-1].line}`: " if frames else ""
    return where + str(error).split("\n")[0].rstrip(". ")


def _out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; torch has no class of its own for that of the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _free_memory(device: torch.device) -> int:
    """Bytes that may be taken on a device, as far as can be told."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    with suppress(OSError, StopIteration):
        line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable"))
        return int(line.split()[1]) << 10
    return 1 << 32
