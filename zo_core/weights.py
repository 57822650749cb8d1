"""The trained tensors of an optimizer as they are now, and the passes over them."""

import math
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from . import scaling, sharding
from .bindings import native, ops
from .bindings.warn import warn
from .kernels.reference import MOMENT_FLOOR, columns_of

RESIDUALS = {8: torch.int8, 16: torch.int16}  # dtypes, by bits
_CHUNK = 1 << 20  # weights that are summed at a time for a checksum

Probe = Tensor  # int64 (1,): a stream number, on the device of the weights; a probe is known by its identity
Point = tuple[float, Probe | None]  # (c, probe) is theta + c z(probe); (0.0, None) is theta itself


class Update(NamedTuple):
    """What a step's pass does to T tensors along K probes; see ``ParamSpace.update_``. All zero where the step must not move the weights."""

    usable: Tensor  # bool, (): whether every number of the step is finite
    coeffs: Tensor  # (K, T)
    decay: Tensor  # (T,)
    curvature: Tensor | None = None  # (K, T)
    smoothing: Tensor | None = None  # (T,)
    squares: Tensor | None = None  # (K, T)


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of these names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@dataclass
class ParamSpace:
    """T tensors, numbered in order, and the noise that runs through them."""

    names: list[str]
    tensors: list[Tensor]
    seed: int
    distribution: str
    counters: Tensor  # int64 (1 + T,): no-op passes, saturated elements of each tensor
    residuals: list[Tensor] = field(default_factory=list)  # low-order bits of 16-bit tensors, or empty
    hessian: str | None = None  # one of scaling.KINDS
    hessians: list[list[Tensor]] = field(default_factory=list)  # of each tensor, where there is one; see ``scaling``
    rank: int = 1  # of factored noise
    padding: dict[int, int] = field(
        default_factory=dict
    )  # of embeddings, the row that no pass changes; see ``padding_of``
    pieces: sharding.Pieces | None = None  # where tensors are shards of larger ones; then only ``update_`` is served
    scales: tuple[float, ...] = ()  # what the coefficients of each tensor are multiplied by; none where all are 1

    def __post_init__(self) -> None:
        """Make what passes need of factored Hessians, and of scales."""
        with torch.inference_mode(False):
            self._sigma = torch.tensor(self.scales, dtype=torch.float32, device=self.counters.device)
        self._hessian_arguments: dict[str, Any] = {}
        self._refresh_hessian_arguments()
        self._prepared: tuple[list[Any], Callable[..., None]] = [], lambda *_, **__: None  # see ``_in_place``

    def _refresh_hessian_arguments(self) -> None:
        with torch.inference_mode(False):
            scales = scaling.of_passes(self.hessians, self.hessian) if self.hessian else {}
        for name, old in self._hessian_arguments.items():  # where passes that are prepared look for them
            scales[name] = [a.copy_(b) for a, b in zip(old, scales[name], strict=True)]
        self._hessian_arguments = scales

    @contextmanager
    def _written(self) -> Iterator[list[Tensor]]:
        """The tensors for a pass that writes them: contiguous, as noise goes by that order, and afterwards with their padding rows."""
        tensors = [t if t.is_contiguous() or not is_dense(t) else t.detach().contiguous() for t in self.tensors]
        rows = [
            flat[part]
            for i, row in self.padding.items()
            for flat in (tensors[i].detach().view(-1), *(r.view(-1) for r in self.residuals[i : i + 1] if r.numel()))
            for part in self._places(i, row)
        ]
        before = [x.clone() for x in rows]
        yield tensors
        for x, kept in zip(rows, before, strict=True):
            x.copy_(kept)
        for own, written in zip(self.tensors, tensors, strict=True):
            if own is not written:
                own.detach().copy_(written)

    def _places(self, i: int, row: int) -> list[slice]:
        """Where the elements of a row of tensor i are in its memory here."""
        columns = self.tensors[i].shape[1] if self.pieces is None else self.pieces.widths[i]
        first, last = row * columns, (row + 1) * columns
        return [slice(first, last)] if self.pieces is None else self.pieces.places(i, first, last)

    def update_(
        self,
        probes: Sequence[Probe],
        coeffs: Tensor,
        decay: Tensor | None = None,
        update: Tensor | None = None,
        restore: Tensor | None = None,
        curvature: Tensor | None = None,
        smoothing: Tensor | None = None,
        squares: Tensor | None = None,
    ) -> None:
        """Theta <- round((1 - decay) (theta + s sum_k restore[k] z_k) + s' sum_k coeffs[k] z_k), one pass, in place.

        s is 1, or H^-1/2 with a Hessian, and s' comes of H' = (1 - smoothing + sum_k curvature[k] z_k^2) H. With squares, which
        take no Hessian and no restore, s' is 1 / (sqrt(sum_k squares[k] z_k^2) + 1e-5).

        Args:
            probes: K streams.
            coeffs: float32 (K, T).
            decay: float32 (T,).
            update: stream of the stochastic rounding of 16-bit tensors; None rounds to nearest.
            restore: float32 (K, T).
            curvature: float32 (K, T), with a Hessian only, and with smoothing.
            smoothing: float32 (T,).
            squares: float32 (K, T).
        """
        more: dict[str, Any] = {}
        if squares is not None and self.distribution == "gaussian":
            more = {"squares": squares}
        elif squares is not None:  # z^2 is 1, so that the second moment is one number for all elements of a tensor
            coeffs = coeffs / (reduce(torch.add, squares).sqrt() + MOMENT_FLOOR)
        if curvature is not None and self.hessian == "diagonal":
            restore = torch.zeros_like(coeffs) if restore is None else restore
            more = {"restore": restore, "curvature": curvature, "smoothing": smoothing}
        elif curvature is not None and smoothing is not None:
            learned = self._learn(probes, curvature, smoothing)  # first: what can fail must not come between passes
            if restore is not None:
                self.update_(probes, restore)
            for old, new in zip(self.hessians, learned, strict=True):
                for a, b in zip(old, new, strict=True):
                    a.copy_(b)
            self._refresh_hessian_arguments()
        elif restore is not None:
            coeffs = coeffs + (1 - decay if decay is not None else 1) * restore
        streams = torch.cat(list(probes)) if probes else torch.empty(0, dtype=torch.int64, device=coeffs.device)
        scalars: dict[str, Any] = {"coeffs": coeffs, "counters": self.counters, "decay": decay, "update": update}
        scalars |= {"streams": streams, **more}
        with self._written() as tensors:
            if self.pieces is not None:
                scalars |= {"hessians": [], **self._hessian_arguments, **self._noise()}
                self.pieces.update_(tensors, residuals=self.residuals or None, **scalars)
                return
            self._in_place(tensors)(tensors, **scalars, **self._noise() | {"seed": self.seed})
            written = (*tensors, *self.residuals, *self._hessian_arguments.get("hessians", ()))
            increment_version([t for t in written if not t.is_inference()])

    def _in_place(self, tensors: Sequence[Tensor]) -> Callable[..., None]:
        """The pass that writes these tensors: prepared once, as long as all of its tensors stay where they are."""
        beside = {"hessians": [], **self._hessian_arguments}
        kept = [(t.data_ptr(), t.numel(), t.dtype) for t in (*tensors, *self.residuals, *chain(*beside.values()))]
        if kept != self._prepared[0]:
            device, ids = self.counters.device, list(range(len(tensors)))
            of: dict[str, Any] = {"tensor_ids": ids, "offsets": [], "residuals": self.residuals, **beside}
            none = (
                torch.empty(0, dtype=torch.int64, device=device),
                torch.empty(0, len(tensors), dtype=torch.float32, device=device),
            )
            torch.ops.zo_core.update_(  # of no probes, which changes nothing: a check of all tensors
                tensors, **of | {"residuals": self.residuals or None}, streams=none[0], coeffs=none[1],
                counters=self.counters, **self._noise(),
            )  # fmt: skip
            self._prepared = kept, ops.prepare(device, tensors, tensors, **of)
        return self._prepared[1]

    def replay_(self, streams: Tensor, coeffs: Tensor, decay: Tensor, updates: Tensor | None) -> None:
        """S times ``update_`` without a Hessian, one step after the other, to the same bits in one pass.

        Args:
            streams: int64 (S, K).
            coeffs: float32 (S, K, T).
            decay: float32 (S, T).
            updates: int64 (S,), streams of the stochastic rounding; None rounds to nearest.
        """
        with self._written() as tensors:
            torch.ops.zo_core.replay_(
                tensors,
                list(range(len(tensors))),
                [],
                streams,
                coeffs,
                counters=self.counters,
                decay=decay,
                updates=updates,
                residuals=self.residuals or None,
                **self._noise(),
            )

    def _learn(self, probes: Sequence[Probe], curvature: Tensor, smoothing: Tensor) -> list[list[Tensor]]:
        """New factors of all tensors, which are the old ones where curvature and smoothing are zero."""
        out, device = [], curvature.device
        sizes = [
            min(t.numel(), max(scaling.BLOCK, h[-1].numel())) for t, h in zip(self.tensors, self.hessians, strict=True)
        ]
        # once for all tensors: blocks that come and go fragment the heap
        noise, total = torch.empty(2, max(sizes), dtype=torch.float32, device=device)
        one, uncounted = torch.ones(1, 1, dtype=torch.float32, device=device), self.counters.new_zeros(2)
        for i, h in enumerate(self.hessians):

            def squares(first: int, last: int, i: int = i) -> Tensor:
                """Sum_k curvature[k] z_k^2 of elements of tensor i."""
                z: Tensor = noise[: last - first]
                weighted: Tensor = total[: last - first].zero_()
                for probe, weight in zip(probes, curvature[:, i], strict=True):
                    torch.ops.zo_core.update_(
                        [z.zero_()], [], [i], [first], probe, one, counters=uncounted, **self._noise()
                    )
                    weighted.addcmul_(z.square_(), weight)
                if (row := self.padding.get(i)) is not None:
                    columns = self.tensors[i].shape[1]
                    weighted[max(0, row * columns - first) : max(0, (row + 1) * columns - first)] = 0
                return weighted

            out.append(scaling.factors(h, squares, smoothing[i]))
        return out

    def perturb(
        self, which: Sequence[int], sources: Sequence[Tensor], out: Sequence[Tensor]
    ) -> Callable[[Sequence[Tensor], Probe, Tensor, Tensor], None]:
        """Makes out <- round(theta + coeffs s z(probe)), of n of the tensors, which are only read.

        Args:
            which: their numbers.
            sources: their values (``tensors``, under whatever name).
            out: n tensors of their shapes, of any of the three dtypes.

        Returns:
            A function of sources, which must be where they are now, probe, coeffs, float32 (1, n), and counters,
            int64 (1 + n,).
        """
        residuals = [self.residuals[i] for i in which] if self.residuals else []
        scales = {
            "hessians": [],
            **{name: [scale[i] for i in which] for name, scale in self._hessian_arguments.items()},
        }
        device = self.counters.device
        beside = {"tensor_ids": which, "offsets": [], "residuals": residuals, **scales}
        still = [(n, row) for n, i in enumerate(which) if (row := self.padding.get(i)) is not None]
        ordered = all(t.is_contiguous() for t in (*sources, *out))
        run = ops.prepare(device, sources, out, **beside) if ordered else None

        def make(sources: Sequence[Tensor], probe: Probe, coeffs: Tensor, counters: Tensor) -> None:
            scalars: dict[str, Any] = {"streams": probe, "coeffs": coeffs, "counters": counters}
            scalars |= {"seed": self.seed, "distribution": self.distribution, "rank": self.rank}
            if run is not None:
                run(sources, **scalars)
            else:  # noise goes by the index in the contiguous tensor
                flat = [t.contiguous() for t in sources]
                made = [t if t.is_contiguous() else torch.empty(t.shape, dtype=t.dtype, device=device) for t in out]
                ops.prepare(device, flat, made, **beside)(flat, **scalars)
                for t, x in zip(out, made, strict=True):
                    if t is not x:
                        t.copy_(x)
            for n, row in still:
                out[n][row].copy_(sources[n][row])

        return make

    def perturb_points(
        self, which: Sequence[int], sources: Sequence[Tensor], out: Sequence[Tensor]
    ) -> Callable[[Sequence[Tensor], Tensor, Tensor, Tensor], None]:
        """As ``perturb``, at P points: out is n tensors (P, *shape), of which [p] is at theta + coeffs[p] z(streams[p]).

        Returns:
            A function of sources, streams, int64 (P,), coeffs, float32 (P, n), and counters, int64 (1 + n P,).
        """
        n, points = len(which), len(out[0])
        if ops.backend_for(self.counters.device) is not native:
            makes = [self.perturb(which, sources, [copies[p] for copies in out]) for p in range(points)]

            def one_by_one(sources: Sequence[Tensor], streams: Tensor, coeffs: Tensor, counters: Tensor) -> None:
                for p, make in enumerate(makes):
                    make(sources, streams[p : p + 1], coeffs[p : p + 1], counters[: 1 + n])

            return one_by_one
        every = [(i, source, copy) for i, source, copies in zip(which, sources, out, strict=True) for copy in copies]
        make = self.perturb(*zip(*every, strict=True))

        def at_once(sources: Sequence[Tensor], streams: Tensor, coeffs: Tensor, counters: Tensor) -> None:
            each = [source for source in sources for _ in range(points)]
            own = coeffs.T.diag_embed().transpose(0, 1).flatten(1)  # (P, n P): no work for a coefficient of zero
            make(each, streams, own, counters)

        return at_once

    def perturb_rows(
        self, i: int, source: Tensor, rows: Tensor, out: Tensor, probe: Probe, coeffs: Tensor, counters: Tensor
    ) -> None:
        """As ``perturb``, of the rows (int64, (n,)) of one matrix, into the n rows of ``out``; rows are not checked."""
        residual = self.residuals[i] if self.residuals and self.residuals[i].numel() else None
        scales = {name.removesuffix("s"): scale[i] for name, scale in self._hessian_arguments.items()}
        ops.backend_for(probe.device).run_rows(  # what torch.ops.zo_core.perturb_rows calls when it has checked all of this
            source.contiguous(), rows, out, i, 0, probe, coeffs, counters=counters, residual=residual, seed=self.seed,
            distribution=self.distribution, rank=self.rank, **scales,
        )  # fmt: skip
        if (row := self.padding.get(i)) is not None:
            out.copy_(torch.where((rows == row).unsqueeze(1), source[row].to(out.dtype), out))

    def full(self, c: float, leave_out: Collection[int] = ()) -> Tensor:
        """A row of coefficients: c times its scale for every tensor but those left out, float32 (1, T)."""
        row = torch.full((1, len(self.tensors)), c, dtype=torch.float32, device=self.counters.device)
        if self.scales:
            row *= self._sigma
        if leave_out:
            row[0, list(leave_out)] = 0.0
        return row

    def checksums(self) -> list[tuple[int, int]]:
        """For each tensor, which of its elements are here, and a checksum of them, their residuals and Hessians."""
        out = []
        for i, p in enumerate(self.tensors):
            where = zlib.crc32(str(self.pieces.runs[i]).encode()) if self.pieces else 0
            beside = [*self.residuals[i : i + 1], *(self.hessians[i] if self.hessians else ())]
            out.append((where, reduce(checksum, (p, *beside), 0)))
        return out

    @torch.no_grad()
    def warn_of_small_eps(self, eps: float) -> None:
        """A warning that names the tensors that are too coarse for probes of this size."""
        small = []
        for name, p, scale in zip(self.names, self.tensors, self.scales or (1.0,) * len(self.tensors), strict=True):
            if p.numel():
                rms = float(torch.linalg.vector_norm(p, dtype=torch.float32)) / math.sqrt(p.numel())
                if 0 < rms < math.inf and eps * scale < 2.0 ** math.floor(math.log2(rms)) * torch.finfo(p.dtype).eps:
                    small.append(name)
        if small:
            scaled = " times its scale" * bool(self.scales)
            warn(
                f"eps={eps}{scaled} is less than the spacing of its numbers around the RMS of {some(small)}: such probes are mostly "
                "rounding. Use a larger eps or float32 weights.",
            )

    def _noise(self) -> dict[str, Any]:
        return {"seed": ops.signed64(self.seed), "distribution": self.distribution, "rank": self.rank}


def is_dense(t: Tensor) -> bool:
    """Whether the elements of a strided tensor fill its memory once, in whatever order: channels_last, a transposed matrix."""
    size = 1
    for stride, n in sorted((stride, n) for stride, n in zip(t.stride(), t.shape, strict=True) if n != 1):
        if stride != size:
            return False
        size *= n
    return True


def laid_out(flat: Tensor, like: Tensor, lead: Sequence[int] = ()) -> Tensor:
    """A flat tensor in the shape of another one and with its order in memory, or several such, of which ``lead`` is the shape."""
    if like.is_contiguous() or not is_dense(like):
        return flat.view((*lead, *like.shape))
    return flat.as_strided((*lead, *like.shape), (*(like.numel() for _ in lead), *like.stride()))


def padding_of(module: nn.Module | None, parameters: Sequence[Tensor]) -> dict[int, int]:
    """By number, the row of each embedding that stays as it is: its ``padding_idx``, to which torch gives no gradient.

    A matrix that another module reads too (a tied head) has none: a gradient would reach all of its rows.
    """
    numbers, found = {id(p): i for i, p in enumerate(parameters)}, dict[int, set[int | None]]()
    for m in modules_of(module):
        row = m.padding_idx if isinstance(m, nn.Embedding | nn.EmbeddingBag) else None
        for p in m._parameters.values():
            if id(p) in numbers:
                found.setdefault(numbers[id(p)], set()).add(row)
    return {i: row for i, rows in found.items() for row in rows if row is not None and len(rows) == 1}


def space_of(
    names: list[str], parameters: Sequence[Tensor], own: dict[str, Any], padding: dict[int, int] | None = None
) -> ParamSpace:
    """The space of these parameters as they are now, checked by a pass that changes nothing.

    Args:
        names: one a parameter.
        parameters: tensors, or DTensors, of which the space has the shards.
        own: the state of an optimizer. Its counters, residuals and Hessians grow where there are more tensors than
            before; a residual starts from 0, and a Hessian from 1, where it does not fit its tensor any longer.
        padding: see ``ParamSpace``.
    """
    tensors, pieces = [sharding.local(p) for p in parameters], None
    ops.require_one_device(names, tensors)
    device = tensors[0].device
    if any(map(sharding.is_sharded, parameters)):
        runs = [sharding.runs_of(name, p) for name, p in zip(names, parameters, strict=True)]
        pieces = sharding.Pieces(runs, columns_of(parameters), device)
        own["shards"] = zlib.crc32(str(runs).encode())
    if "scales" in own:  # a tensor that is new has 1, so that sum d sigma^2 = d stays
        own["scales"] += (1.0,) * (len(tensors) - len(own["scales"]))
    with torch.inference_mode(False):
        more = torch.zeros(1 + len(tensors) - len(own["counters"]), dtype=torch.int64, device=device)
        counters, residuals, hessians = torch.cat([own["counters"], more]), own["residuals"], own["hessians"]
        if own["residual"]:
            new = empty_residuals(tensors, own["residual"])
            pairs = zip(residuals, new, strict=False)
            residuals = [r if r.shape == n.shape else n for r, n in pairs] + new[len(residuals) :]
        if own["hessian"]:
            kind, known = own["hessian"], len(hessians)
            fits = [
                [tuple(x.shape) for x in h] == scaling.shapes_of(p, kind)
                for h, p in zip(hessians, tensors, strict=False)
            ]
            hessians = [
                hessians[i] if i < known and fits[i] else scaling.identity(p, kind) for i, p in enumerate(tensors)
            ]
            if anew := [name for name, fine in zip(names, fits, strict=False) if not fine]:
                warn(f"{some(anew)}: has another shape; its Hessian starts from 1")
    space = ParamSpace(
        names,
        tensors,
        own["seed"],
        own["distribution"],
        counters,
        residuals,
        own["hessian"],
        hessians,
        rank=own.get("rank", 1),
        padding=padding or {},
        pieces=pieces,
        scales=own.get("scales", ()),
    )
    try:
        space.update_([], torch.empty(0, len(tensors), dtype=torch.float32, device=device))
    except (TypeError, ValueError) as error:
        if pieces is not None:  # whose numbers are not those of tensors
            raise
        raise type(error)(re.sub(r"\bweights\[(\d+)\]", lambda found: names[int(found[1])], str(error))) from None
    own |= {"counters": counters, "residuals": residuals, "hessians": hessians}
    return space


def modules_of(module: nn.Module | None) -> list[nn.Module]:
    """As ``module.modules()``, but faster: its nested generators take half a millisecond for 300 modules."""
    modules = [] if module is None else [module]
    seen = set(modules)
    for m in modules:
        for child in m._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                modules.append(child)
    return modules


def inside(module: nn.Module | None, parameters: Sequence[Tensor]) -> set[int]:
    """Numbers of the tensors that are parameters of the module."""
    numbers = {id(p): i for i, p in enumerate(parameters)}
    return {numbers[id(p)] for m in modules_of(module) for p in m._parameters.values() if id(p) in numbers}


def check_absent(module: nn.Module, names: Sequence[str], gone: Sequence[int]) -> None:
    """A warning that names tensors that were the module's; RuntimeError if what it has instead is on the meta device."""
    now = dict(module.named_parameters())
    lost = [names[i] for i in gone]
    if offloaded := [name for name in lost if name in now and now[name].is_meta]:
        raise RuntimeError(
            f"{some(offloaded)}: on the meta device now (offloaded?), where nothing can be trained: offload before the "
            "optimizer is made, or not the trained parameters"
        )
    replaced = [name for name in lost if name in now]
    absent = [name for name in lost if name not in now]
    what = " and ".join(
        f"{some(which, 5)}: {how}"
        for which, how in ((replaced, "replaced by another parameter"), (absent, "no longer a parameter of the module"))
        if which
    )
    warn(
        f"{what}. What the optimizer trains is not what the module reads: make the optimizer after parameters are replaced "
        "(load_state_dict(assign=True), a new head, another adapter)",
    )


def empty_residuals(tensors: Sequence[Tensor], bits: int) -> list[Tensor]:
    """Residuals of 0 for 16-bit tensors, empty ones for others."""
    return [torch.zeros(t.shape if t.itemsize == 2 else 0, dtype=RESIDUALS[bits], device=t.device) for t in tensors]


def versions_of(tensors: Sequence[Tensor]) -> list[tuple[object, ...]]:
    """For each tensor, values that change when somebody writes it or replaces its memory."""
    return [(p.data_ptr(), p.dtype, -1 if p.is_inference() else p._version) for p in tensors]


def hashes_of(parameters: Sequence[Tensor], residuals: Sequence[Tensor]) -> list[int | str | None]:
    """Checksums of the tensors that have a residual: a saved residual belongs to these values only. Of a shard, with its place."""
    out: list[int | str | None] = []
    for p, r in zip(parameters, residuals, strict=False):
        found = checksum(0, sharding.local(p).cpu()) if r.numel() else None
        out.append(f"{sharding.place(p)}: {found}" if found is not None and sharding.is_sharded(p) else found)
    return out


def is_other(saved: int | str | None, now: int | str | None) -> bool:
    """Whether a saved hash is of other values than there are now: not known of one of another shard, which checkpoints may give."""
    if saved is None or saved == -1:
        return saved == -1
    return str(saved).rpartition(": ")[0] == str(now).rpartition(": ")[0] and saved != now


def clear_residuals(names: Sequence[str], residuals: Sequence[Tensor], written: Sequence[bool]) -> None:
    """Zero the residuals of tensors that somebody else has written (a loaded checkpoint, say), with a warning."""
    cleared = []
    for name, residual, wrong in zip(names, residuals, written, strict=False):
        if wrong:
            cleared += [name] if residual.numel() else []
            residual.zero_()
    if cleared:
        warn(f"{some(cleared)}: written since the last step; the residuals there start from 0")


def checksum(before: int, t: Tensor) -> int:
    """CRC-32 of a contiguous tensor's bytes; of its ``sums`` if it is not on the CPU, so that no weight has to go there."""
    data = t.detach().reshape(-1).view(torch.uint8) if t.device.type == "cpu" else sums(t).cpu()
    return zlib.crc32(data.numpy(), before)  # type: ignore[arg-type]


def sums(t: Tensor) -> Tensor:
    """The sum of every million bit patterns, int64, on the tensor's device."""
    ints = {1: torch.int8, 2: torch.int16, 4: torch.int32}[t.itemsize]
    parts = torch.split(t.detach().reshape(-1).view(ints), _CHUNK)
    return torch.stack([x.sum(dtype=torch.int64) for x in parts])
