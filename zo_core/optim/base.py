"""What all zeroth-order optimizers share: the step, its state, and how it survives failure."""

import math
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn

from .. import layers, scaling, sharding
from ..bindings import ops
from ..distributed import Exchange, Parallel, checksum
from ..engines.base import Engine, uninterrupted
from ..engines.inplace import InPlaceEngine
from ..engines.shadow import ShadowEngine
from ..estimators import Estimate, Losses, carried
from ..journal import Journal
from ..kernels.reference import DISTRIBUTIONS
from ..space import ParamSpace, Probe, some

Params = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
_STATE = "zo"  # key of the optimizer-wide entry in `state`


class Options(TypedDict, total=False):
    """What all methods take beside ``params``, ``lr`` and their own; see ``ZOOptimizer``."""

    eps: float
    weight_decay: float
    probes: int | None
    seed: int
    distribution: str | None
    rho: float | None
    blocks: layers.Blocks | None
    hessian: str | None
    stochastic_rounding: bool
    residual: int | None
    engine: str | None
    module: nn.Module | None
    processes: Parallel | None


class Shared:
    """An option that all groups share, a number in a range; it may be set anew between steps, in ``param_groups[0]``."""

    def __init__(self, least: float, most: float, kind: type = Real) -> None:
        self.least, self.most, self.kind = least, most, kind

    def __set_name__(self, owner: type, name: str) -> None:
        """Take the attribute's name."""
        self.name = name

    def __get__(self, optimizer: "ZOOptimizer | None", owner: type) -> Any:
        """The number; this object where there is no optimizer."""
        return self if optimizer is None else optimizer.param_groups[0][self.name]

    def check(self, value: object) -> None:
        """ValueError, TypeError unless it is such a number."""
        if isinstance(value, Real) and not isinstance(value, self.kind):
            raise ValueError(f"{self.name}: expected an integer, got {value!r}")
        _in_range(self.name, value, self.least, self.most)


def _in_range(name: str, value: object, least: float = 0.0, most: float = sys.float_info.max) -> None:
    if not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not least <= float(value) <= most:
        bounds = f"of at least {least:g}" if most == sys.float_info.max else f"from {least:g} to {most:g}"
        raise ValueError(f"{name}: expected a finite number {bounds}, got {value}")


class ZOOptimizer(torch.optim.Optimizer):
    """Base of the methods; a method says in ``estimate`` where to evaluate and what to step along.

    Args:
        params: a module (its trainable parameters), or what torch optimizers take: tensors, (name, tensor) pairs
            or groups. Tensors that are frozen now are left out, tied ones must come once (``model.parameters()``
            does that).
        lr: learning rate; may be scheduled, and set per group.
        eps: size of the perturbation; the same in all groups.
        weight_decay: decoupled, theta <- theta - lr * weight_decay * theta. For a module it skips vectors and
            scalars (biases, norms); tensors and groups of your own are decayed as they say.
        probes: number of probes a step averages over; None: the method's own, as for all that follow.
        seed: 64-bit seed that all noise is a function of.
        distribution: "gaussian" or "rademacher".
        rho: fraction of the model's blocks that a step leaves out, in [0, 1); see ``LeZO``. Like ``lr`` it may be set
            anew between steps, in ``param_groups[0]``.
        blocks: those blocks, or the dotted name of the list that has them; None: the largest ``nn.ModuleList``.
        hessian: "diagonal" or "factored", to scale probes by H^-1/2; see ``HiZOO``. Of methods that measure curvature.
        stochastic_rounding: whether updates round stochastically (unbiased), not to nearest, where they round to 16
            bits or to the 24 of a weight with an 8-bit residual.
        residual: low-order bits, 8 or 16, that each 16-bit weight keeps in a tensor of this optimizer (1 or 2 bytes a
            weight), or None. The value that is trained is weight + residual, the weight alone is the value rounded.
            float32 weights keep none. docs/precision.md says what each costs and saves.
        engine: "shadow" perturbs what modules read and never writes a weight to probe it; "inplace" writes the
            weights, for closures that are arbitrary functions of them, and for sharded ones (DTensors). None: shadow
            where a module is known and no weight is sharded.
        module: the module whose forwards use the tensors, where ``params`` is not that module itself.
        processes: how the processes of ``torch.distributed`` share a step (docs/distributed.md); None: each is alone.
        method: further options of the method, each a ``Shared`` of its class.

    Raises:
        ValueError, TypeError: an argument out of its range, no trainable tensor, or one that the fused pass cannot
            serve (not float32, bfloat16 or float16; not contiguous; on another device; overlapping memory).
        RuntimeError: ``processes`` without ``torch.distributed``.
    """

    journal: Journal | None = None  # where each step leaves a record, if set
    _default: ClassVar[dict[str, Any]] = {"probes": 1, "distribution": "gaussian", "rho": 0.0, "hessian": None}
    _measures_curvature = False  # whether estimates have a curvature, which Hessian scaling needs

    eps = Shared(1e-30, 1e30)  # what float32 arithmetic can carry
    probes = Shared(1, 1 << 20, Integral)
    rho = Shared(0.0, math.nextafter(1.0, 0.0))

    _shared: ClassVar[tuple[Shared, ...]] = ()
    _engine: Engine | None = None
    _exchange: Exchange | None = None
    _units: Sequence[Any] = ()  # parts of the module that FSDP2 gathers
    _blocks: Sequence[set[int]] = ()
    _stepping = False
    _versions: list[tuple[object, ...]] | None = None
    _seen: list[tuple[object, ...]] | None = None

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
        rho: float | None = None,
        blocks: layers.Blocks | None = None,
        hessian: str | None = None,
        stochastic_rounding: bool = True,
        residual: int | None = 8,
        engine: str | None = None,
        module: nn.Module | None = None,
        processes: Parallel | None = None,
        method: Mapping[str, float] | None = None,
    ) -> None:
        given: dict[str, Any] = {"probes": probes, "distribution": distribution, "rho": rho, "hessian": hessian}
        probes, distribution, rho, hessian = (v if v is not None else self._default[k] for k, v in given.items())
        if distribution not in DISTRIBUTIONS:
            raise ValueError(f"distribution: expected one of {list(DISTRIBUTIONS)}, got {distribution!r}")
        if residual not in (None, 8, 16):
            raise ValueError(f"residual: expected None, 8 or 16 bits, got {residual!r}")
        if engine not in (None, "shadow", "inplace"):
            raise ValueError(f"engine: expected 'shadow', 'inplace' or None, got {engine!r}")
        if hessian is not None and (hessian not in scaling.KINDS or not self._measures_curvature):
            which = list(scaling.KINDS) if self._measures_curvature else "none, as this method measures no curvature"
            raise ValueError(f"hessian: expected {which}, got {hessian!r}; HiZOO and SPSA take one")
        ops.signed64(seed)
        self.stochastic_rounding, self.blocks = stochastic_rounding, blocks
        self.module = params if isinstance(params, nn.Module) and module is None else module
        if isinstance(self.module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "params: expected the module without DistributedDataParallel, which is for gradients: give model.module (of "
                "accelerate: prepare_model(model, evaluation_mode=True)), and processes=zo_core.distributed.Parallel()"
            )
        sharding.reshard(sharding.units(self.module))  # an evaluation may have left weights gathered
        if engine == "shadow" and self.module is None:
            raise ValueError("engine: 'shadow' needs the module whose forwards use the tensors: pass module=")
        if isinstance(params, nn.Module):
            params = [{"params": list(params.named_parameters()), "decay_vectors": False}]
        shared = {"eps": eps, "probes": probes, "rho": rho, **(method or {})}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "decay_vectors": True, **shared})
        in_place = self.module is None or self._sharded()
        self.engine, self.processes = engine or ("inplace" if in_place else "shadow"), processes
        self._check_processes(hessian)
        device = self._tensors()[0].device
        self._own = {"seed": seed, "distribution": distribution, "residual": residual, "residuals": [], "hashes": []}
        self._own |= {
            "hessian": hessian,
            "hessians": [],
            "steps": 0,
            "carry": torch.zeros(0, device=device),
            "shards": 0,
        }
        self._own["method"] = type(self).__name__
        with torch.inference_mode(False):
            for name in ("stream", "updates", "skipped", "counters"):
                self._own[name] = torch.zeros(1, dtype=torch.int64, device=device)
        self._prepare()

    def __init_subclass__(cls) -> None:
        """Collect the method's options."""
        super().__init_subclass__()
        cls._shared = tuple(x for name in dir(cls) if isinstance(x := getattr(cls, name), Shared))

    # ---- what a method gives -----------------------------------------------------------------------------------

    def estimate(self, losses: Losses) -> Estimate:
        """Evaluate losses, and say where to go."""
        raise NotImplementedError

    def draw(self, n: int) -> list[Probe]:
        """The next n probes of this optimizer's life."""
        stream = self._own["stream"]
        streams = stream + torch.arange(n, device=stream.device)
        stream += n
        return list(streams.split(1))

    # ---- the step ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor | float]) -> Tensor:  # type: ignore[override]
        """One step.

        Args:
            closure: returns the loss of the current batch at the current weights, a scalar tensor or a number; no
                backward. It is called a few times (the first step of the shadow engine calls it once more, to see
                that all weights are read where it expects) and must do the same each time (dropout does: torch's
                generators are rewound).

        Returns:
            The mean or clean loss of the evaluations, 0-dimensional, float32 or float64.

        Raises:
            TypeError, ValueError: the closure returned no scalar.
            Exception: whatever the closure raises; the weights and this optimizer are put back first.
        """
        if not callable(closure):
            raise TypeError(f"closure: expected a function that returns the loss, got {closure!r}")
        if self._stepping:
            raise RuntimeError("step: called from inside its own closure, where the weights are perturbed")
        for group in self.param_groups:
            self._check_rates(group)
        self._check_shared(self.param_groups[0])
        engine, state = self._prepare(), self._own
        if (exchange := self._joined()) is not None:
            exchange.start(self)
        stream, generators = state["stream"].clone(), _Generators(state["stream"].device)

        def evaluation() -> Tensor:
            generators.rewind()
            torch.clear_autocast_cache()  # which knows parameters by their identity, not by their values
            sharding.reshard(self._units)
            return _scalar(closure(), stream.device)

        left_out = self._left_out()

        def evaluate(c: float, probe: Probe | None) -> Tensor:
            return engine.evaluate(evaluation, c, probe, left_out)

        def pass_by(c: float, probe: Probe | None) -> None:
            if isinstance(engine, InPlaceEngine):  # going there and back rounds, as it does in other processes
                engine.evaluate(lambda: stream, c, probe, left_out)

        def losses(points: Sequence[tuple[float, Probe | None]]) -> Tensor:
            if exchange is None:
                return torch.stack([evaluate(c, p) for c, p in points])
            return exchange.losses(evaluate, pass_by, points, state["steps"])

        done, self._stepping = False, True
        try:
            found = self.estimate(losses)
            lr, decay = rates = self._rates()
            scalars = [found.coeffs.float().unsqueeze(1) * -lr, decay.unsqueeze(0)]
            if found.curvature is not None and state["hessian"]:
                scalars += [
                    found.curvature.float().unsqueeze(1),
                    torch.full_like(scalars[1], self.param_groups[0]["smoothing"]),
                ]
            usable = torch.stack([found.loss.isfinite(), *(x.isfinite().all() for x in scalars)]).all()
            moved = usable & engine.space.full(1.0, left_out).bool()  # a NaN costs a step, no weight
            steps, decay, *metric = (torch.where(moved, x, 0.0) for x in scalars)
            number = state["updates"] + state["skipped"]  # of the rounding: skipped steps restore, and round as well
            metric = [metric[0], metric[1][0]] if metric else []
            with uninterrupted():
                if self.journal is not None:  # before the weights move: without its record a step does not happen
                    if not isinstance(self.journal, Journal):
                        raise TypeError(f"journal: expected Journal.create(path, optimizer), got {self.journal!r}")
                    self.journal.write_step(
                        self, number, found, *rates, moved=usable, stochastic=self.stochastic_rounding, left_out=left_out,
                        smoothing=self.param_groups[0]["smoothing"] if metric else None,
                    )  # fmt: skip
                rounding = number if self.stochastic_rounding else None
                engine.update(found.probes, steps, decay[0], rounding, *metric)
                state["updates"] += usable
                state["skipped"] += ~usable
                state["steps"] += 1
                state["carry"] = carried(state["carry"], found.carry, usable)
                done = True
        except BaseException:  # all of the step or nothing: a signal held back until it was done changes nothing
            if not done:
                with uninterrupted():
                    engine.restore()
                    state["stream"].copy_(stream)
                    generators.rewind()
            raise
        finally:
            self._stepping = False
            sharding.reshard(self._units)
            self._versions = self._tensor_versions()
        return found.loss

    def _left_out(self) -> set[int]:
        """Numbers of the tensors that this step leaves out."""
        rho = self.param_groups[0]["rho"]
        if (rho or self.blocks is not None) and not self._blocks:
            found = layers.find_blocks(self.module, self.blocks)
            self._blocks = layers.tensors_of(found, self._parameters(), self.module)
        return layers.left_out(self._blocks, rho, seed=self.seed, step=self._own["steps"])

    def _rates(self) -> tuple[Tensor, Tensor]:
        """Learning rate and lr * weight_decay of each tensor, float32 (T,)."""
        rates = []
        for group in self.param_groups:
            lr, wd = group["lr"], group["weight_decay"]
            rates += [(lr, lr * wd if group["decay_vectors"] or p.ndim > 1 else 0.0) for p in group["params"]]
        device = self._own["stream"].device
        if any(isinstance(lr, Tensor) for lr, _ in rates):
            columns = [
                torch.stack([torch.as_tensor(x, device=device).reshape(()) for x in c])
                for c in zip(*rates, strict=True)
            ]
            return columns[0].float(), columns[1].float()
        both = torch.tensor(rates, dtype=torch.float32, device=device)
        return both[:, 0], both[:, 1]

    # ---- the space of weights ----------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; frozen tensors are left out. Ids of the noise count on from the groups before."""
        given = param_group["params"]
        given = [given] if isinstance(given, Tensor) else list(given)
        keep = [p for p in given if (p[1] if isinstance(p, tuple) else p).requires_grad]
        if not keep:
            raise ValueError(f"params: expected tensors with requires_grad=True to train, got {len(given)} frozen ones")
        super().add_param_group({**param_group, "params": keep})
        group = self.param_groups[-1]
        try:
            self._check_rates(group)
            self._check_shared(group)
            for name in (option.name for option in self._shared):
                if group[name] != (first := self.param_groups[0][name]):
                    raise ValueError(f"{name}: expected {first} as in the first group, got {group[name]}")
            if len(self.param_groups) > 1 and _STATE in dict(self.state):
                self._check_processes(self._own["hessian"])
                self._engine = None
                self._prepare()
        except BaseException:
            self.param_groups.pop()
            raise

    def _check_rates(self, group: dict[str, Any]) -> None:
        rate = group["lr"]
        if isinstance(rate, Tensor) and rate.numel() == 1:
            rate = 0.0 if rate.is_cuda else rate.item()  # not waited for: one that is not finite skips the step
        _in_range("lr", rate)
        _in_range("weight_decay", group["weight_decay"])

    def _check_shared(self, group: dict[str, Any]) -> None:
        for option in self._shared:
            option.check(group[option.name])

    def _sharded(self) -> bool:
        """Whether a weight is, trained or frozen: then forwards exchange weights, and all processes must make the same ones."""
        inside = self.module.parameters() if self.module is not None else ()
        return any(map(sharding.is_sharded, (*self._parameters(), *inside)))

    def _check_processes(self, hessian: str | None) -> None:
        if not isinstance(self.processes, Parallel | None):
            raise TypeError(f"processes: expected zo_core.distributed.Parallel(), got {self.processes!r}")
        if (sharded := self._sharded()) and (self.processes is None or self.module is None):
            raise ValueError(
                "params: they are sharded (DTensors): pass processes=zo_core.distributed.Parallel(), so that all shards take "
                "one step, and the module (module=), so that its forwards gather them anew"
            )
        if sharded and self.module is not None:
            inside = set(self.module.parameters())
            if gone := [n for n, p in zip(self._names(), self._parameters(), strict=True) if p not in inside]:
                raise ValueError(
                    f"params: {some(gone)}: no parameter of the module as it is when its weights are not gathered; give the "
                    "module, or its parameters after reshard()"
                )
        probes = self.processes.grid()[1] if self.processes is not None else 1
        if sharded and self.engine == "shadow":
            raise ValueError("engine: 'shadow' cannot serve sharded weights (DTensors): leave it out, or 'inplace'")
        if probes > 1 and self.engine == "inplace":
            raise ValueError(
                f"processes: expected probes=1 with engine='inplace', got {probes}: the way to a probe and back rounds, so "
                "that weights would differ between processes that go to different ones"
            )
        if sharded and hessian == "factored":
            raise ValueError(
                "hessian: 'factored' needs whole rows and columns, these weights are sharded: use 'diagonal'"
            )

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _tensors(self) -> list[Tensor]:
        """Their memory in this process: shards of those that are sharded."""
        return [sharding.local(p) for p in self._parameters()]

    def _names(self) -> list[str]:
        return [
            name
            for i, group in enumerate(self.param_groups)
            for name in group.get("param_names", (f"group {i} tensor {j}" for j in range(len(group["params"]))))
        ]

    def _prepare(self) -> Engine:
        """The engine over the tensors as they are now; they are checked without being touched."""
        sharding.reshard(self._units)
        state, tensors = self._own, self._tensors()
        device = tensors[0].device
        if state["stream"].device != device:  # the model has moved
            state.update({k: _to(v, device) for k, v in state.items()})
            self._engine, self._versions = None, self._tensor_versions()
        if state["residuals"]:
            self._reset_residuals()
        if self._engine is None or self._look(tensors) != self._seen:
            self._units, pieces = sharding.units(self.module), None
            sharding.reshard(self._units)
            if any(map(sharding.is_sharded, self._parameters())):
                runs = [sharding.runs_of(n, p) for n, p in zip(self._names(), self._parameters(), strict=True)]
                pieces = sharding.Pieces(runs, device)
                state["shards"] = zlib.crc32(str(runs).encode())
            with torch.inference_mode(False):
                more = torch.zeros(1 + len(tensors) - len(state["counters"]), dtype=torch.int64, device=device)
                counters, residuals = torch.cat([state["counters"], more]), state["residuals"]
                if state["residual"]:  # of new tensors, and of those that have another dtype now
                    new = [self._no_residual(p) for p in tensors]
                    pairs = zip(residuals, new, strict=False)
                    residuals = [r if r.shape == n.shape else n for r, n in pairs] + new[len(residuals) :]
                hessians = state["hessians"]
                if kind := state["hessian"]:
                    hessians = hessians + [scaling.identity(p, kind) for p in tensors[len(hessians) :]]
            space = ParamSpace(
                self._names(),
                tensors,
                state["seed"],
                state["distribution"],
                counters,
                residuals,
                kind,
                hessians,
                pieces,
            )
            space.update_([], torch.empty(0, len(tensors), dtype=torch.float32, device=device))
            state |= {"counters": counters, "residuals": residuals, "hessians": hessians}
            self._blocks = ()
            self._left_out()
            self._warn_of_small_eps(space)
            self._engine = ShadowEngine(space, self.module) if self.engine == "shadow" else InPlaceEngine(space)  # type: ignore[arg-type]
            self._versions, self._seen = self._tensor_versions(), self._look(tensors)
        return self._engine

    def _look(self, tensors: Sequence[Tensor]) -> list[tuple[object, ...]]:
        """What an engine is made for: dtypes, and the memory of shards, which the space of weights holds on to."""
        pairs = zip(tensors, self._parameters(), strict=True)
        return [(t.dtype, None if t is p else t.data_ptr()) for t, p in pairs]

    # ---- residuals ---------------------------------------------------------------------------------------------

    def _no_residual(self, p: Tensor) -> Tensor:
        dtype = {8: torch.int8, 16: torch.int16}[self._own["residual"]]
        return torch.zeros(p.shape if p.dtype.itemsize == 2 else 0, dtype=dtype, device=p.device)

    def _tensor_versions(self) -> list[tuple[object, ...]]:
        return [(p.data_ptr(), p.dtype, -1 if p.is_inference() else p._version) for p in self._tensors()]

    def _reset_residuals(self) -> None:
        """Zero those of weights that somebody else has written: a loaded checkpoint, say."""
        state, tensors, versions = self._own, self._tensors(), self._tensor_versions()
        if self._versions is None:  # since a state was loaded: are these the weights it was saved with?
            written = [
                h is not None and h != checksum(0, p.cpu()) for p, h in zip(tensors, state["hashes"], strict=False)
            ]
        else:
            written = [a != b for a, b in zip(self._versions, versions, strict=False)]
        names = []
        for i, (name, wrong) in enumerate(zip(self._names(), written, strict=False)):
            if wrong:
                names += [name] if state["residuals"][i].numel() else []
                state["residuals"][i].zero_()
        self._versions, state["hashes"] = versions, []
        if names:
            warnings.warn(
                f"{some(names)}: written since the last step; the residuals there start from 0",
                stacklevel=4,
            )

    @torch.no_grad()
    def _warn_of_small_eps(self, space: ParamSpace) -> None:
        small = []
        for name, p in zip(space.names, space.tensors, strict=True):
            if p.numel():
                rms = float(torch.linalg.vector_norm(p, dtype=torch.float32)) / math.sqrt(p.numel())
                if 0 < rms < math.inf and self.eps < 2.0 ** math.floor(math.log2(rms)) * torch.finfo(p.dtype).eps:
                    small.append(name)
        if small:
            warnings.warn(
                f"eps={self.eps} is less than the spacing of its numbers around the RMS of {some(small)}: such probes are mostly rounding. Use a larger eps or float32 weights.",
                stacklevel=5,
            )

    # ---- state -------------------------------------------------------------------------------------------------

    @property
    def _own(self) -> dict[str, Any]:
        """What belongs to no single tensor: seed, distribution, stream and counters."""
        return self.state[_STATE]  # type: ignore[index, no-any-return]

    @_own.setter
    def _own(self, value: dict[str, Any]) -> None:
        self.state[_STATE] = value  # type: ignore[index]

    @property
    def carry(self) -> Tensor:
        """What the last step's estimate left for this one, (n,)."""
        carry: Tensor = self._own["carry"]
        return carry

    @property
    def seed(self) -> int:
        """Seed of all noise."""
        return int(self._own["seed"])

    @property
    def updates(self) -> int:
        """Steps that moved the weights (waits for the device)."""
        return int(self._own["updates"])

    @property
    def skipped(self) -> int:
        """Steps that a non-finite loss or coefficient made a no-op (waits for the device)."""
        return int(self._own["skipped"])

    @property
    def saturated(self) -> dict[str, int]:
        """By tensor, how often a weight was beyond its dtype's range and set to its largest value (waits for the device)."""
        counts = self._own["counters"][1:].tolist()
        return {name: n for name, n in zip(self._names(), counts, strict=True) if n}

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
            exchange.compare(self)

    def _joined(self) -> Exchange | None:
        """What joins the processes; they make it together."""
        if self._exchange is None and self.processes is not None:
            self._exchange = Exchange(self.processes)
        return self._exchange

    def memory(self) -> dict[str, int]:
        """Bytes: ``weights`` that are trained, their ``residuals``, ``hessians``, and what the engine took beside them, at most so far."""
        return {
            "weights": sum(p.nbytes for p in self._tensors()),
            "residuals": sum(r.nbytes for r in self._own["residuals"]),
            "hessians": sum(t.nbytes for h in self._own["hessians"] for t in h),
            **(self._engine.memory() if self._engine is not None else {}),
        }

    def state_dict(self) -> dict[str, Any]:
        """As torch's; with residuals there are hashes of the weights they belong to. Not inside a closure."""
        if self._stepping:
            raise RuntimeError("state_dict: called from inside the closure, in the middle of a step")
        hashes = self._own["hashes"]
        if self._versions is not None:
            self._reset_residuals()
        if self._versions is not None or not hashes:  # else it was loaded, and so were its hashes
            pairs = zip(self._tensors(), self._own["residuals"], strict=False)
            hashes = [checksum(0, p.cpu()) if r.numel() else None for p, r in pairs]
        state: dict[str, Any] = super().state_dict()
        small = {name: x.clone() for name, x in self._own.items() if isinstance(x, Tensor)}  # as ``steps`` is: of now
        return {**state, "state": {**state["state"], _STATE: {**self._own, **small, "hashes": hashes}}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; the run continues bit for bit. ValueError if it is not a state of such an optimizer."""
        saved = state_dict.get("state", {}).get(_STATE)
        if saved is None or set(saved) != set(self._own):
            raise ValueError(
                f"state_dict: expected state[{_STATE!r}] with {sorted(self._own)} as zo_core optimizers "
                f"save, got {sorted(saved) if isinstance(saved, dict) else saved!r}"
            )
        for name in ("method", "hessian"):
            if saved[name] != self._own[name]:
                raise ValueError(f"state_dict: expected {name} {self._own[name]!r}, got one of {saved[name]!r}")
        if 0 not in (own := self._own["shards"], saved["shards"]) and own != saved["shards"]:
            raise ValueError("state_dict: it is of other shards: each process goes on with the state that it saved")
        for name in ("residuals", "hessians"):
            mine, theirs = ([_shape(x) for x in own[name]] for own in (self._own, saved))
            if mine and theirs and mine != theirs:
                raise ValueError(f"state_dict: expected {name} of shapes {mine}, got {theirs}")
        super().load_state_dict(state_dict)
        device = self._tensors()[0].device
        with torch.inference_mode(False):
            self._own = {k: _to(v, device, copy=True) for k, v in self._own.items()}
        self._engine = self._versions = None
        if self._exchange is not None:
            self._exchange.compared = False

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: the engine is rebuilt."""
        own = {name: getattr(self, name) for name in ("stochastic_rounding", "blocks", "engine", "module", "processes")}
        return {**super().__getstate__(), **own}


def _to(x: Any, device: torch.device, copy: bool = False) -> Any:
    """X, or the tensors of the list x, on a device."""
    if isinstance(x, list):
        return [_to(y, device, copy) for y in x]
    return x.to(device, copy=copy) if isinstance(x, Tensor) else x


def _shape(x: Any) -> Any:
    return tuple(x.shape) if isinstance(x, Tensor) else [_shape(y) for y in x]


def _scalar(loss: object, device: torch.device) -> Tensor:
    if not isinstance(loss, Tensor | float | int) and not hasattr(loss, "__float__"):
        raise TypeError(f"closure: expected it to return a scalar loss, got {type(loss).__name__}; return the loss")
    value = loss if isinstance(loss, Tensor) else torch.tensor(float(loss), dtype=torch.float64, device="cpu")  # type: ignore[arg-type]
    if value.numel() != 1 or value.is_complex():
        raise ValueError(f"closure: expected a real scalar loss, got {value.dtype} of shape {tuple(value.shape)}")
    if sharding.is_sharded(value):
        value = value.full_tensor()  # type: ignore[attr-defined]
    return value.detach().reshape(()).to(device, torch.promote_types(value.dtype, torch.float32))


class _Generators:
    """torch's generators as they are before the first evaluation of a step: dropout is the same in all of them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def rewind(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.own is not None:
            torch.cuda.set_rng_state(self.own, self.device)
