"""Probes that never touch the weights: a parameter that is read during an evaluation answers with a perturbed copy.

Parameters are perturbed in groups: the largest parts of the model that fit in ``structure.most_of`` bytes, so a transformer's
layer, or all of a small model. When a parameter is read, its whole group is perturbed in one pass into one of two scratch
buffers, and other reads of the group find their copies there. An embedding gets only the rows that it looks up.

Some code reads parameters where no interception sees it. It gets copies too: for the time that such code runs, a
parameter's ``data`` is its perturbed copy. A compiled module's parameters are exchanged while that module runs, and those
of scripted modules, of extensions and of compiled functions around a model for a whole evaluation.
"""

import math
import threading
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..bindings.warn import warn
from ..weights import ParamSpace, Probe, Update, laid_out, some
from .base import Engine, uninterrupted
from .intercept import UNTRACEABLE, WRITTEN, Interception, refuse_nested
from .scratch import Key, Scratch, aligned
from .structure import Plan, Region, compiled_regions, groups, most_of, refuse_aliases

_CHECKS = 8  # evaluations that are looked at for reads elsewhere, while the closure's result does not change


class ShadowEngine(Engine):
    """Evaluates at theta + c z without writing theta: bit-identical weights after any number of probes.

    The clean point is one like all others, so that all losses of a step take one path through torch. At the first
    evaluation the closure is called once more, with parameters whose own values are not numbers: if its result shows that,
    something reads parameters where interception does not see it. A warning names those that nothing else has read, and
    from then on they are exchanged for copies.
    """

    def __init__(self, space: ParamSpace, module: nn.Module) -> None:
        self.space, self.module, self.device = space, module, space.counters.device
        self._numbers = {id(p): i for i, p in enumerate(space.tensors)}
        refuse_aliases(module, space, self._numbers)
        self._plan = Plan(groups(module, space.tensors, most_of(space.tensors, self.device)))
        self._regions = compiled_regions(module, self._numbers)
        self._interception, self._scratch = Interception(space, self), Scratch(self.device)
        self._lock = threading.RLock()  # modules may run in threads of their own
        self._looked_up: set[int] = set()  # embeddings of which rows were read
        self._swapped: dict[int, Tensor] = {}  # copies that parameters are exchanged for in whole evaluations
        self._checks = _CHECKS  # comparisons that may still be made
        self._result: Tensor | None = None  # of the last one
        with torch.inference_mode(False):
            self._uncounted = space.counters.new_zeros(1 + len(space.tensors))  # a probe that saturates harms no weight
            self._clean = space.counters.new_zeros(1)  # stream of the clean point, whose coefficients are 0
        # Of the evaluation that runs:
        self._sources: list[Tensor] = []  # the weights, whatever data their parameters have
        self._wrapped: list[Region] = []  # compiled modules whose calls come by here
        self._kept: list[Tensor] = []  # copies whose address was asked for
        self._probe, self._left_out, self._row, self._coeffs = (
            self._clean,
            frozenset[int](),
            space.full(0),
            space.full(0),
        )
        scripted = [m for m in module.modules() if isinstance(m, torch.jit.ScriptModule)]
        elsewhere = {self._numbers.get(id(p)) for m in scripted for p in m.parameters()} - {None}
        subclasses = {i for i, p in enumerate(space.tensors) if type(p) not in (nn.Parameter, Tensor)}
        self._swap(sorted(subclasses.union(elsewhere)))  # type: ignore[arg-type]

    # ---- the engine --------------------------------------------------------------------------------------------

    def evaluate(
        self, closure: Callable[[], Tensor], c: float, probe: Probe | None, leave_out: Collection[int] = ()
    ) -> Tensor:
        """The closure's result at theta + c z(probe), z = 0 in tensors left out; at theta without a probe."""
        run = partial(self._run, closure, *((0.0, self._clean) if probe is None else (c, probe)))
        if self._checks:
            result = run()  # all tensors are looked at, also those that this probe leaves out
            if not self._finds_reads_elsewhere(run, result) and not leave_out:
                return result
        return run(leave_out)

    def update(self, probes: Sequence[Probe], update: Update, rounding: Tensor | None) -> None:
        """Move the weights in one pass."""
        u = update
        self.space.update_(probes, u.coeffs, u.decay, rounding, None, u.curvature, u.smoothing, u.squares)

    def restore(self) -> None:
        """End an evaluation, wherever it was left: parameters are theta again."""
        self._interception.stop()
        for region in self._wrapped:
            region.owner.__dict__[region.name] = region.code
        for p, source in zip(self.space.tensors, self._sources, strict=False):  # none where nothing is evaluated
            if p.data_ptr() != source.data_ptr():
                p.data = source
        self._sources, self._wrapped, self._kept = [], [], []
        self._scratch.empty()

    def memory(self) -> dict[str, int]:
        """Bytes of scratch, the most so far, and of the copies that parameters are exchanged for in whole evaluations."""
        return {"scratch": self._scratch.peak, "held": sum(t.nbytes for t in self._swapped.values())}

    # ---- one evaluation ----------------------------------------------------------------------------------------

    def _run(
        self, closure: Callable[[], Tensor], c: float, probe: Probe, leave_out: Collection[int] = (), hide: bool = False
    ) -> Tensor:
        """One call of the closure; ``hide``: parameters themselves are not numbers meanwhile."""
        try:
            with uninterrupted():
                self._begin(c, probe, leave_out, hide)
            result = closure()
            self._refuse_writes()
            return result
        except RuntimeError as error:
            if UNTRACEABLE not in str(error) or not self._serve_compiled():
                raise
        finally:
            with uninterrupted():
                self.restore()
        return self._run(closure, c, probe, leave_out, hide)

    def _begin(self, c: float, probe: Probe, leave_out: Collection[int], hide: bool) -> None:
        """From now on, functions that read parameters get theta + c z."""
        tensors = self.space.tensors
        refuse_nested(self.space.names, tensors)
        self._sources = [p.data for p in tensors]
        self._probe, self._left_out = probe, frozenset(leave_out)
        self._row = self.space.full(c)
        self._coeffs = self.space.full(c, leave_out) if leave_out else self._row
        if which := [i for i in self._swapped if i not in self._left_out]:
            copies, sources = [self._swapped[i] for i in which], [self._sources[i] for i in which]
            self._perturb(self.space.perturb(which, sources, copies), which, sources)
            for i, copy in zip(which, copies, strict=True):
                tensors[i].data = copy
        elsewhere = {*self._swapped, *self._left_out}
        intercepted = [i for i in range(len(tensors)) if i not in elsewhere]
        if hide:
            self._hide(intercepted)
        for region in self._regions:
            self._wrapped.append(region)
            region.owner.__dict__[region.name] = partial(self._call_region, region)
        self._interception.start(intercepted)

    def _perturb(self, make: Callable[..., None], which: Sequence[int], sources: list[Tensor]) -> None:
        """Write theta + c z of these tensors where ``make`` was prepared for."""
        n = len(which)
        alike = not self.space.scales and self._left_out.isdisjoint(which)
        coeffs = self._row[:, :n] if alike else self._coeffs[:, list(which)]
        make(sources, self._probe, coeffs, self._uncounted[: 1 + n])

    def _refuse_writes(self) -> None:
        for buffer in self._scratch.buffers:
            if buffer.written():
                names = ", ".join(self.space.names[i] for i, _ in buffer.layouts[buffer.group].copies)
                raise RuntimeError(f"closure: it wrote one of {names} during an evaluation; {WRITTEN}")

    # ---- what a read answers -----------------------------------------------------------------------------------

    def read(self, i: int, dtype: torch.dtype | None = None, keep: bool = False) -> Tensor:
        """Tensor i of theta + c z, in this dtype or its own; ``keep``: at an address that is its until the evaluation ends."""
        with self._lock:
            # A leaf with requires_grad and no view, so that matmul folds a batch into rows, as it does for parameters. Each
            # read makes one of its own: a buffer is written again when no tensor that was made of it is alive.
            copy = self._copy((i, dtype or self._sources[i].dtype)).detach().requires_grad_()
            if keep:
                self._kept.append(copy)
            return copy

    def _copy(self, key: Key) -> Tensor:
        """A copy in its group's buffer. One that its group was filled without is made alone, and with it the next time."""
        (i, dtype), plan = key, self._plan
        name = (plan.group_of[i], *plan.lead)
        buffer = self._scratch.holding(name)
        if buffer is not None and (found := buffer.layouts[name].copies.get(key)) is not None:
            return found
        plan.dtypes[i] = dtype
        if buffer is None:
            return self._fill(name, plan.known(plan.group_of[i]))[key]
        source = self._sources[i]
        with torch.inference_mode(False):
            size = source.numel() * math.prod(plan.lead)
            alone = laid_out(torch.empty(size, dtype=dtype, device=self.device), source, plan.lead)
        perturb = self.space.perturb_points if plan.lead else self.space.perturb
        self._perturb(perturb([i], [source], [alone]), [i], [source])
        return alone

    def _fill(self, group: Hashable, keys: list[Key]) -> dict[Key, Tensor]:
        """Copies of a group's tensors, made in one pass."""
        self._refuse_writes()  # before a buffer is taken, which forgets its copies
        which, sources = [i for i, _ in keys], [self._sources[i] for i, _ in keys]
        lead = self._plan.lead
        sizes = [aligned(math.prod(lead) * s.numel() * k[1].itemsize) for k, s in zip(keys, sources, strict=True)]
        buffer = self._scratch.take(sum(sizes))
        layout = buffer.lay_out(group, keys, sources, self.space, lead)
        self._perturb(layout.make, which, sources)
        buffer.filled(group)
        return layout.copies

    def product(self, i: int, x: Tensor, dtype: torch.dtype | None, transposed: bool, bias: Any) -> Tensor | None:
        """Torch multiplies by a copy."""
        return None

    def read_rows(self, i: int, index: Tensor) -> Tensor:
        """Rows of matrix i of theta + c z, as an embedding returns them: (*index.shape, columns)."""
        source = self._sources[i]
        out = torch.empty(*index.shape, source.shape[1], dtype=source.dtype, device=source.device)
        self._look_up(i, index, out, self._probe, self._coeffs[:, i : i + 1])
        return out

    def _look_up(self, i: int, index: Tensor, out: Tensor, probe: Probe, c: Tensor) -> None:
        """Write these rows of matrix i of theta + c z to ``out``."""
        self._looked_up.add(i)
        source, rows = self._sources[i], index.reshape(-1).to(torch.int64)
        inside = ((rows >= 0) & (rows < source.shape[0])).all()
        if rows.is_cuda:
            torch._assert_async(inside)  # no wait for the device, as torch's own check
        elif not inside:
            raise IndexError(f"embedding: index out of range in {self.space.names[i]}")
        out = out.view(rows.numel(), source.shape[1])
        self.space.perturb_rows(i, source, rows, out, probe, c, self._uncounted[:2])

    # ---- what reads parameters where interception does not see it ------------------------------------------------

    def _call_region(self, region: Region, *args: Any, **kwargs: Any) -> Any:
        """Call a compiled module, whose parameters' data are perturbed copies meanwhile."""
        which = [i for i in region.tensors if i not in self._swapped]
        keys, buffer = [(i, self._sources[i].dtype) for i in which], self._scratch.holding(region.owner)
        with self._lock:
            copies = buffer.layouts[region.owner].copies if buffer else self._fill(region.owner, keys)
        with self._interception.without(which), swapped([self.space.tensors[i] for i in which], copies.values()):
            return region.code(*args, **kwargs)

    def _serve_compiled(self) -> bool:
        """Prepare for compiled code that was met, by new regions or by exchanging all parameters. False if both were done before."""
        regions, before = compiled_regions(self.module, self._numbers), [r.owner for r in self._regions]
        self._regions, new = regions, [r for r in regions if r.owner not in before]
        rest = [i for i in range(len(self.space.tensors)) if i not in self._swapped]
        if not new:
            self._swap(rest)
        return bool(new or rest)

    def _swap(self, which: Sequence[int]) -> None:
        """Exchange these for copies in each evaluation from now on."""
        if which:
            with torch.inference_mode(False):
                self._swapped |= {i: torch.empty_like(self.space.tensors[i].data) for i in which}
            size = sum(self._swapped[i].nbytes for i in which)
            warn(
                f"{some([self.space.names[i] for i in which], 5)}: read elsewhere than by torch's functions (compiled or "
                "scripted code, an extension). They are exchanged for perturbed copies during each evaluation, which takes "
                f"{size / 2**20:.1f} MiB",
            )

    def _hide(self, which: Sequence[int]) -> None:
        """Set the data of these parameters to NaN, until ``restore``."""
        largest: dict[torch.dtype, int] = {}
        for i in which:
            largest[self._sources[i].dtype] = max(largest.get(self._sources[i].dtype, 0), self._sources[i].numel())
        with torch.inference_mode(False):
            nan = {dtype: torch.full((n,), torch.nan, dtype=dtype, device=self.device) for dtype, n in largest.items()}
        for i in which:
            source = self._sources[i]
            self.space.tensors[i].data = laid_out(nan[source.dtype][: source.numel()], source)

    def _finds_reads_elsewhere(self, run: Callable[..., Tensor], result: Tensor) -> bool:
        """Whether the closure reads parameters without interception; if so, they are exchanged from now on."""
        if not result.isfinite():
            return False
        if self._result is not None and result != self._result:  # the closure tells probes apart:
            self._checks = (
                0 if self._checks == _CHECKS - 1 else 1
            )  # done, or one last time after results that were alike
        if not self._checks:
            return False
        self._checks, self._result = self._checks - 1, result
        seen = {*self._plan.dtypes, *self._looked_up, *(i for r in self._regions for i in r.tensors)}
        rest = [i for i in range(len(self.space.tensors)) if i not in self._swapped]
        found = False
        for which in ([i for i in rest if i not in seen], [i for i in rest if i in seen]):
            if which:
                if not self._shows(run, result):
                    break
                self._swap(which)
                found, result = True, run()
        return found

    def _shows(self, run: Callable[..., Tensor], result: Tensor) -> bool:
        """Whether the closure's result changes when the data of parameters are NaN."""
        try:
            seen = run(hide=True)
        except Exception as error:
            error.add_note(
                "zo_core: raised while the shadow engine looked for weights that are read past it, by calling the closure "
                "with NaN in their places; engine='inplace' does without"
            )
            raise
        if seen.isfinite() and seen != result:  # a metric of NaN, or a closure that is never the same
            return bool(run() == result)
        return not bool(seen.isfinite())


@contextmanager
def swapped(parameters: Sequence[Tensor], data: Iterable[Tensor]) -> Iterator[None]:
    """The parameters have other data meanwhile."""
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for p, other in zip(parameters, data, strict=True):
            before.append((p, p.data))
            p.data = other
        yield
    finally:
        for p, own in before:
            p.data = own
