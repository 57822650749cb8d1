"""What all zeroth-order optimizers share: the step, its state, and how it survives failure."""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..bindings import ops
from ..engines.inplace import InPlaceEngine, uninterrupted
from ..kernels.reference import DISTRIBUTIONS
from ..space import ParamSpace, Probe

Params = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
Losses = Callable[..., Tensor]  # losses(c, probe) is the loss at theta + c z(probe); losses(0.0) at theta
_STATE = "zo"  # key of the optimizer-wide entry in `state`


class ZOOptimizer(torch.optim.Optimizer):
    """Base of the methods; a method says in ``estimate`` where to evaluate and what to step along.

    Args:
        params: a module (its trainable parameters), or what torch optimizers take: tensors, (name, tensor) pairs
            or groups. Frozen tensors are left out, tied ones must come once (``model.parameters()`` does that).
        lr: learning rate; may be scheduled, and set per group.
        eps: size of the perturbation; the same in all groups.
        weight_decay: decoupled, theta <- theta - lr * weight_decay * theta. For a module it skips vectors and
            scalars (biases, norms); groups of your own are decayed as they say.
        probes: number of probes a step averages over.
        seed: 64-bit seed that all noise is a function of.
        distribution: "gaussian" or "rademacher".
        stochastic_rounding: whether updates of 16-bit weights round stochastically (unbiased), not to nearest.

    Raises:
        ValueError, TypeError: an argument out of its range, no trainable tensor, or one that the fused pass cannot
            serve (not float32, bfloat16 or float16; not contiguous; on another device; overlapping memory).
    """

    _engine: InPlaceEngine | None = None

    def __init__(
        self,
        params: Params,
        *,
        lr: float | Tensor,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        probes: int = 1,
        seed: int = 0,
        distribution: str = "gaussian",
        stochastic_rounding: bool = True,
    ) -> None:
        if distribution not in DISTRIBUTIONS:
            raise ValueError(f"distribution: expected one of {list(DISTRIBUTIONS)}, got {distribution!r}")
        ops.signed64(seed)
        self.stochastic_rounding = stochastic_rounding
        vectors = not isinstance(params, nn.Module)
        if isinstance(params, nn.Module):
            params = list(params.named_parameters())
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "probes": probes, "decay_vectors": vectors}
        super().__init__(params, defaults)
        device = self._tensors()[0].device
        self._own = {
            "seed": seed,
            "distribution": distribution,
            "stream": torch.zeros(1, dtype=torch.int64, device=device),
            "updates": torch.zeros(1, dtype=torch.int64, device=device),
            "skipped": torch.zeros(1, dtype=torch.int64, device=device),
            "counters": torch.zeros(2, dtype=torch.int64, device=device),
        }
        self._prepare()

    # ---- what a method gives -----------------------------------------------------------------------------------

    def estimate(self, losses: Losses) -> tuple[list[Probe], Tensor, Tensor]:
        """Evaluate losses and say where to go: K probes, coefficients (K,) of -lr along them, and the loss."""
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
                backward. It is called a few times and must do the same each time (dropout does: torch's generators
                are rewound).

        Returns:
            The mean or clean loss of the evaluations, 0-dimensional, float32 or float64.

        Raises:
            TypeError, ValueError: the closure returned no scalar.
            Exception: whatever the closure raises; the weights and this optimizer are put back first.
        """
        if not callable(closure):
            raise TypeError(f"closure: expected a function that returns the loss, got {closure!r}")
        engine, state = self._prepare(), self._own
        stream, generators = state["stream"].clone(), _Generators(state["stream"].device)

        def losses(c: float, probe: Probe | None = None) -> Tensor:
            generators.rewind()
            return _scalar(engine.evaluate(closure, c, probe), stream.device)

        try:
            probes, coeffs, loss = self.estimate(losses)
            lr, decay = self._rates()
            steps = coeffs.float().unsqueeze(1) * -lr
            usable = loss.isfinite() & steps.isfinite().all() & decay.isfinite().all()
            steps, decay = (torch.where(usable, x, 0.0) for x in (steps, decay))  # a NaN costs a step, no weight
            with uninterrupted():
                engine.update(probes, steps, decay, state["updates"] if self.stochastic_rounding else None)
                state["updates"] += usable
                state["skipped"] += ~usable
        except BaseException:
            with uninterrupted():
                engine.restore()
                state["stream"].copy_(stream)
                generators.rewind()
            raise
        return loss

    def _rates(self) -> tuple[Tensor, Tensor]:
        """Learning rate and lr * weight_decay of each tensor, float32 (T,)."""
        rates = []
        for group in self.param_groups:
            lr, wd = group["lr"], group["weight_decay"]
            rates += [(lr, lr * wd if group["decay_vectors"] or p.ndim > 1 else 0.0) for p in group["params"]]
        device = self._own["stream"].device
        if any(isinstance(lr, Tensor) for lr, _ in rates):
            columns = [torch.stack([torch.as_tensor(x, device=device) for x in c]) for c in zip(*rates, strict=True)]
            return columns[0].float(), columns[1].float()
        both = torch.tensor(rates, device=device)
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
            _check_options(group, self.param_groups[0]["eps"], self.param_groups[0]["probes"])
            if len(self.param_groups) > 1 and _STATE in dict(self.state):
                self._engine = None
                self._prepare()
        except BaseException:
            self.param_groups.pop()
            raise

    def _tensors(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _names(self) -> list[str]:
        return [
            name
            for i, group in enumerate(self.param_groups)
            for name in group.get("param_names", (f"group {i} tensor {j}" for j in range(len(group["params"]))))
        ]

    def _prepare(self) -> InPlaceEngine:
        """The engine over the tensors as they are now; they are checked without being touched."""
        state, tensors = self._own, self._tensors()
        device = tensors[0].device
        if state["stream"].device != device:  # the model has moved
            state.update({k: v.to(device) for k, v in state.items() if isinstance(v, Tensor)})
            self._engine = None
        if self._engine is None:
            space = ParamSpace(self._names(), tensors, state["seed"], state["distribution"], state["counters"])
            space.update_([], torch.empty(0, len(tensors), device=device))
            self._warn_of_small_eps(space)
            self._engine = InPlaceEngine(space)
        return self._engine

    @torch.no_grad()
    def _warn_of_small_eps(self, space: ParamSpace) -> None:
        small = []
        for name, p in zip(space.names, space.tensors, strict=True):
            if p.dtype != torch.float32 and p.numel():
                rms = float(torch.linalg.vector_norm(p, dtype=torch.float32)) / math.sqrt(p.numel())
                if 0 < rms < math.inf and self.eps < 2.0 ** math.floor(math.log2(rms)) * torch.finfo(p.dtype).eps:
                    small.append(name)
        if small:
            more = f" and {len(small) - 3} more" if len(small) > 3 else ""
            warnings.warn(
                f"eps={self.eps} is less than the spacing of 16-bit numbers around the RMS of {', '.join(small[:3])}"
                f"{more}: such probes are mostly rounding. Use a larger eps or float32 weights.",
                stacklevel=4,
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
    def eps(self) -> float:
        """Size of the perturbation."""
        return float(self.param_groups[0]["eps"])

    @property
    def probes(self) -> int:
        """Probes a step."""
        return int(self.param_groups[0]["probes"])

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
    def saturated(self) -> int:
        """Weights that were beyond their dtype's range and were set to its largest value (waits for the device)."""
        return int(self._own["counters"][1])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; the run continues bit for bit. ValueError if it is not a state of such an optimizer."""
        saved = state_dict.get("state", {}).get(_STATE)
        if saved is None or set(saved) != set(self._own):
            raise ValueError(
                f"state_dict: expected state[{_STATE!r}] with {sorted(self._own)} as zo_core optimizers "
                f"save, got {sorted(saved) if isinstance(saved, dict) else saved!r}"
            )
        super().load_state_dict(state_dict)
        device = self._tensors()[0].device
        self._own = {k: v.to(device, copy=True) if isinstance(v, Tensor) else v for k, v in self._own.items()}
        self._engine = None

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: the engine is rebuilt."""
        return {**super().__getstate__(), "stochastic_rounding": self.stochastic_rounding}


def _check_options(group: dict[str, Any], eps: float, probes: int) -> None:
    for name, low_open in (("lr", False), ("eps", True), ("weight_decay", False)):
        value = group[name]
        if not isinstance(value, Tensor) and not (math.isfinite(value) and (value > 0 if low_open else value >= 0)):
            raise ValueError(f"{name}: expected a finite number {'>' if low_open else '>='} 0, got {value}")
    if not isinstance(group["probes"], int) or group["probes"] < 1:
        raise ValueError(f"probes: expected an integer >= 1, got {group['probes']}")
    if group["eps"] != eps or group["probes"] != probes:
        raise ValueError(
            f"eps, probes: expected {eps} and {probes} as in the first group, got {group['eps']} and {group['probes']}"
        )


def _scalar(loss: object, device: torch.device) -> Tensor:
    if not isinstance(loss, Tensor | float | int) and not hasattr(loss, "__float__"):
        raise TypeError(f"closure: expected it to return a scalar loss, got {type(loss).__name__}; return the loss")
    value = loss if isinstance(loss, Tensor) else torch.tensor(float(loss), dtype=torch.float64)  # type: ignore[arg-type]
    if value.numel() != 1 or value.is_complex():
        raise ValueError(f"closure: expected a real scalar loss, got {value.dtype} of shape {tuple(value.shape)}")
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
