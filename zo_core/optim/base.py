"""The step that all zeroth-order optimizers share, which happens as a whole or, after an error, not at all."""

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import engines, layers, sharding
from ..closure import Buffers, Evaluation
from ..distributed import Exchange, Parallel, is_sharded
from ..engines.base import Engine, uninterrupted
from ..estimators import Estimate, Losses, update_of
from ..journal import Journal
from ..noise import backend_of
from ..record import Snapshot, carried
from ..scales import Scales
from ..weights import Probe
from . import records, state
from .attempt import Attempt
from .momentum import with_past
from .options import Params, Shared, check_choices, check_group, named_params, rates_of
from .points import Closure, StepLosses, closures_of
from .tensors import Tensors


class ZOOptimizer(Tensors):
    """Base of the methods; a method says in ``estimate`` where to evaluate and what to step along.

    Args:
        params: a module (its trainable parameters), or what torch optimizers take: tensors, (name, tensor) pairs
            or groups. Tensors that are frozen now are left out, tied ones must come once (``model.parameters()``
            does that).
        lr: learning rate; may be scheduled, and set per group.
        eps: size of the perturbation; the same in all groups.
        weight_decay: decoupled, theta <- theta - lr * weight_decay * theta. For a module it skips vectors and
            scalars (biases, norms); tensors and groups that are given explicitly are all decayed.
        probes: number of probes a step averages over; None: the method's own, as for all that follow.
        seed: 64-bit seed that all noise is a function of.
        distribution: "gaussian", "rademacher" (random signs) or "factored": of a matrix, ``rank`` products of signs of its
            rows and signs of its columns, the cheapest to make; docs/noise.md says what they have in common with signs.
        rank: of factored probes, how many products are summed.
        rho: fraction of the model's blocks that a step leaves out, in [0, 1); see ``LeZO``. Like ``lr`` it may be set
            anew between steps, in ``param_groups[0]``.
        blocks: those blocks, or the dotted name of the list that has them; None: the largest ``nn.ModuleList``.
        hessian: "diagonal" or "factored", to scale probes by H^-1/2; see ``HiZOO``. For methods that measure curvature.
        momentum: beta in [0, 1). A step goes along the estimates of the last ``window`` steps, that of i steps ago times
            beta^i, as torch's SGD does with its momentum (no factor 1 - beta): steps are up to (1 - beta^window) /
            (1 - beta) times as long, which lr has to allow for. 0 is none. It may be set anew between steps, as ``window``.
        window: h, the number of these steps; noise is made again, so no tensor is kept, and the update makes h times as much.
        stochastic_rounding: whether updates round stochastically (unbiased), not to nearest, where they round to 16
            bits or to the 24 of a weight with an 8-bit residual.
        residual: low-order bits, 8 or 16, that each 16-bit weight keeps in a tensor of this optimizer (1 or 2 bytes a
            weight), or None. The value that is trained is weight + residual, the weight alone is the value rounded.
            float32 weights keep none. docs/precision.md says what each costs and saves.
        engine: "shadow" perturbs what modules read and never writes a weight to probe it; "grouped" does so at all
            points of a step in one call of the closure; "inplace" writes the weights, for closures that are arbitrary
            functions of them, and for sharded ones (DTensors). None: shadow, or grouped for factored noise (by which the
            shadow engine evaluates where it was measured to be faster), where a module is known and no weight is sharded.
            docs/engines.md says which to take.
        points_at_once: at how many points the grouped engine evaluates at once, at most; None: as many as memory holds
            and the processor has a use for.
        module: the module whose forwards use the tensors, where ``params`` is not that module itself.
        processes: how the processes of ``torch.distributed`` share a step (docs/distributed.md); None: each is alone.
        scales: sigma of each tensor's probe: a step evaluates at theta +- eps sigma z and moves along sigma z. Numbers by name
            or by pattern such as "*.v_proj.weight" (the first that matches counts, other tensors have 1), the path of a file
            of these (``zo_core.scales``), or one number for each tensor. ``zo_core.calibrate`` measures some.
        normalize_scales: multiply them by one number, so that probes keep their length: sum_t d_t sigma_t^2 = d, where tensor
            t has d_t of the d weights. False takes them as they are.
        method: further options of the method, each a ``Shared`` of its class.

    Raises:
        ValueError, TypeError: an argument out of its range, no trainable tensor, or one that the fused pass cannot
            serve (not float32, bfloat16 or float16; not contiguous; on another device; overlapping memory).
        RuntimeError: ``processes`` without ``torch.distributed``.
    """

    journal: Journal | None = None  # where each step leaves a record, if set
    _default: ClassVar[dict[str, Any]] = {
        "probes": 1, "distribution": "gaussian", "rho": 0.0, "hessian": None, "momentum": 0.0, "window": 10,
    }  # fmt: skip
    _measures_curvature = False  # whether estimates have a curvature, which Hessian scaling needs
    one_sided = False  # whether differences are l(theta + eps z) - l(theta), not l(theta + eps z) - l(theta - eps z)

    eps = Shared(1e-30, 1e30)  # the range in which float32 arithmetic neither overflows nor underflows
    probes = Shared(1, 1 << 20, Integral)
    rho = Shared(0.0, math.nextafter(1.0, 0.0))
    momentum, window = Shared(0.0, math.nextafter(1.0, 0.0)), Shared(1, 1 << 10, Integral)

    _buffers = Buffers(None)  # of the module

    def __init__(
        self,
        params: Params,
        *,
        lr: float | Tensor,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        probes: int | None = None,
        seed: int = 0,
        distribution: str | None = None,
        rank: int = 1,
        rho: float | None = None,
        blocks: layers.Blocks | None = None,
        hessian: str | None = None,
        momentum: float | None = None,
        window: int | None = None,
        stochastic_rounding: bool = True,
        residual: int | None = 8,
        engine: str | None = None,
        points_at_once: int | None = None,
        module: nn.Module | None = None,
        processes: Parallel | None = None,
        scales: Scales | None = None,
        normalize_scales: bool = True,
        method: Mapping[str, float] | None = None,
    ) -> None:
        given: dict[str, Any] = {"probes": probes, "distribution": distribution, "rho": rho, "hessian": hessian}
        given |= {"momentum": momentum, "window": window}
        probes, distribution, rho, hessian, momentum, window = (
            v if v is not None else self._default[k] for k, v in given.items()
        )
        check_choices(
            seed=seed, distribution=distribution, rank=rank, residual=residual, engine=engine, hessian=hessian,
            points_at_once=points_at_once,
            curvature=self._measures_curvature,
        )  # fmt: skip
        self.stochastic_rounding, self.blocks, self.processes = stochastic_rounding, blocks, processes
        self.points_at_once = points_at_once
        self.module = params if isinstance(params, nn.Module) and module is None else module
        if isinstance(self.module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "params: expected the module without DistributedDataParallel, which is for gradients: give model.module (of "
                "accelerate: prepare_model(model, evaluation_mode=True)), and processes=zo_core.distributed.Parallel()"
            )
        sharding.reshard(sharding.units(self.module))  # an evaluation may have left weights gathered
        if engine in engines.NEED_MODULE and self.module is None:
            raise ValueError(f"engine: {engine!r} needs the module whose forwards use the tensors: pass module=")
        groups = named_params(params)
        shared = {"eps": eps, "probes": probes, "rho": rho, "momentum": momentum, "window": window, **(method or {})}
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "decay_vectors": True, **shared})
        self._asked, self._in_place = engine, self.module is None or is_sharded(self._parameters(), self.module)
        device = self._tensors()[0].device
        self._own = state.new(
            type(self).__name__, operator.index(seed), distribution, int(rank), residual, hessian, device
        )
        self._check_processes(hessian)
        self._set_scales(scales, normalize_scales)
        self._check_tensors()
        self._prepare()

    def __init_subclass__(cls) -> None:
        """Collect the method's options."""
        super().__init_subclass__()
        cls._shared = tuple(x for name in dir(cls) if isinstance(x := getattr(cls, name), Shared))

    # ---- what a method gives -----------------------------------------------------------------------------------

    def estimate(self, losses: Losses) -> Estimate:
        """Evaluate losses, and say which probes the step moves along, and how far."""
        raise NotImplementedError

    def draw(self, n: int) -> list[Probe]:
        """New probes: the next n numbers of streams, which no earlier step has used."""
        stream = self._own["stream"]
        streams = stream + torch.arange(n, device=stream.device)
        stream += n
        return list(streams.split(1))

    # ---- the step ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Closure | Sequence[Closure]) -> Tensor:  # type: ignore[override]
        """One step.

        Args:
            closure: returns the loss of the current batch at the current weights, a scalar tensor or a number; no
                backward. It is called a few times, by the grouped engine for several evaluations at once (the first step calls
                it more often, to see that the engine serves it), and must do the same each time. Dropout does, as torch's
                generators are rewound, and so do the module's buffers, which are put back before each call and
                stay as the last one left them. Tensors that it stores are of no use outside of it.
                Or a list of such functions, one for each probe, each of a batch of its own: all that a method evaluates
                for a probe, its clean loss included, is then of that batch. With processes that share the probes, one
                for each probe of this process (docs/distributed.md).

        Returns:
            The mean or clean loss of the evaluations, 0-dimensional, float32 or float64; of several closures, their mean.

        Raises:
            TypeError, ValueError: no function, another number of them than of probes, or the closure returned no scalar.
            Exception: whatever the closure raises; the weights and this optimizer are put back first.
        """
        attempt = self._begin(closure)
        with attempt as losses:
            found = self.estimate(losses)
            with uninterrupted():  # the record, the weights and the counts change together
                self._buffers.end(self._move(attempt.engine, found, losses.left_out))
                attempt.done = True
        self.evaluations += sum(found.numel() for found in losses.seen)
        self._count_flat(torch.cat(losses.seen, dim=1))
        if self.noise_floor is not None:
            self._count_below(losses.differences(), self.noise_floor)
        return found.loss

    @contextmanager
    def trial(self, closure: Closure) -> Iterator[StepLosses]:
        """Losses at any points, without a step: within the block they are what ``estimate`` gets.

        Afterwards weights, state, torch's generators and buffers are as they were, to the bit. Probes are for the caller to
        choose, as numbers of streams; ``draw`` gives those of the next step. Processes that share a step must do the same.
        """
        with torch.no_grad(), self._begin(closure, exact=True) as losses:
            yield losses

    def _begin(self, closure: object, exact: bool = False) -> Attempt:
        """Check all that can be checked before a step, and return what evaluates its losses."""
        if self._stepping:
            raise RuntimeError("step: called from inside its own closure, where the weights are perturbed")
        if not isinstance(self.journal, Journal | None):
            raise TypeError(f"journal: expected Journal.create(path, optimizer), got {self.journal!r}")
        for i, group in enumerate(self.param_groups):
            check_group(group, () if i else self._shared)
        closures = closures_of(closure, self.probes, self.processes.grid()[1] if self.processes is not None else 1)
        sharding.reshard(self._units)  # while weights are gathered, the module has other parameters
        frozen = self._check_tensors()
        if self._buffers.module is not self.module:
            self._buffers = Buffers(self.module)
        engine = self._prepare()
        engine.settle()
        if (exchange := self._joined()) is not None:
            options = {"closures": "one" if callable(closure) else "one for each probe"}
            exchange.start(self._steps, options | records.options_of(self.param_groups), self._snapshot)
        written = engine.space if engine.writes_weights and not engine.space.pieces else None
        evaluation = Evaluation(closures[0], self._own["stream"].device, self._units, self._buffers, written)
        spread, left_out = not callable(closure), self._left_out() | frozen
        return Attempt(self, StepLosses(engine, evaluation, closures, spread, left_out, exchange, self._steps), exact)

    def _move(self, engine: Engine, found: Estimate, left_out: set[int]) -> Tensor:
        """Write the step's record, move the weights and count the step. Returns whether it moved them, bool, 0-dimensional."""
        own, past = self._own, self._own["past"].last(self._remembered)
        smoothing = self.param_groups[0]["smoothing"] if own["hessian"] else None
        lr, decay = rates_of(self.param_groups, own["stream"].device)
        along = with_past(found, past, self.momentum, self.param_groups[0].get("beta2"))
        scales = engine.space.full(1.0, left_out)
        update = update_of(along, lr, decay, scales, past.applied(len(found.probes), scales.shape[1]), smoothing)
        number = own["updates"] + own["skipped"]  # the step's number, which is its stream of the stochastic rounding
        if self._remembered:
            streams = torch.cat([past.streams.new_empty(0), *found.probes])
            remembered = past.then(streams, found.coeffs, update.usable, left_out).last(self._remembered)
        else:
            remembered = past
        after = {
            "updates": own["updates"] + update.usable,
            "skipped": own["skipped"] + ~update.usable,
            "steps": own["steps"] + 1,
            "carry": carried(own["carry"], found.carry, update.usable),
            "past": remembered,
            **({"rows": engine.rows} if engine.rows else {}),
        }
        if self.journal is not None:  # before the weights move: without its record a step does not happen
            identity = self._identity()
            record = records.record_of(
                identity, number, along, update, lr, decay, stochastic=self.stochastic_rounding, left_out=left_out,
                smoothing=smoothing or 0.0, past=len(past.coeffs),
            )  # fmt: skip
            self.journal.write_step(identity, record)
        engine.update(along.probes, update, number if self.stochastic_rounding else None)
        own |= after
        return update.usable

    # ---- other processes ---------------------------------------------------------------------------------------

    @property
    def exchanged(self) -> dict[str, int]:
        """Bytes that this process sent to and received from others: in the last ``step``, and in ``all``."""
        found = self._exchange
        return {"step": found.step, "all": found.total} if found is not None else {"step": 0, "all": 0}

    def compare(self) -> None:
        """Compare weights, options and state of all processes now; all of them must call it, between steps.

        Raises:
            RankError: they differ, or a process is gone.
        """
        if (exchange := self._joined()) is not None:
            exchange.compare(self._steps, self._snapshot)

    def _joined(self) -> Exchange | None:
        """The exchange with other processes, None if there are none; all processes must make it at the same time."""
        if self._exchange is None and self.processes is not None:
            self._exchange = Exchange(self.processes)
        return self._exchange

    def _snapshot(self) -> Snapshot:
        facts = {k: getattr(self, k) for k in ("stochastic_rounding", "engine")} | {"processes": str(self.processes)}
        facts |= {"method": type(self).__name__, "backend": backend_of(self._own["stream"].device)}
        facts |= {**records.options_of(self.param_groups), "blocks": [sorted(block) for block in self._blocks]}
        facts |= records.facts_of(self._own, self._names(), self._parameters())
        return Snapshot(facts, self._names(), self._space().checksums())
