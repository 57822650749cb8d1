"""What an optimizer keeps between steps, how it is saved and loaded, and what there is to ask about it.

Here it is one dict, with residuals and Hessians as lists that have one entry for each tensor. torch, and what saves
optimizers (``torch.distributed.checkpoint``, accelerate, Trainer), expects an entry for each parameter, whatever its name is: in
that form it is saved. A parameter's entry has its residual and its Hessian, and the first one's has all else, under ``KEY``.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import layers, sharding
from ..bindings.warn import warn
from ..distributed import Exchange, Parallel
from ..engines.base import Engine, uninterrupted
from ..record import Identity, Past, Progress
from ..scales import Scales, compare, resolve
from ..weights import ParamSpace, hashes_of, some, versions_of
from .records import identity_of, past_of

_FLAT = 10  # steps in a row with the same losses at all points that are worth a warning
KEY = "zo"  # of what belongs to the optimizer as a whole, in the entry of its first parameter


def new(
    method: str,
    seed: int,
    distribution: str,
    rank: int,
    residual: int | None,
    hessian: str | None,
    device: torch.device,
) -> dict[str, Any]:
    """The state before the first step. Only factored noise has a rank: other states are as they were before there was any."""
    with torch.inference_mode(False):
        numbers = {
            k: torch.zeros(1, dtype=torch.int64, device=device) for k in ("stream", "updates", "skipped", "counters")
        }
        return {
            "seed": seed, "distribution": distribution, "residual": residual, "residuals": [], "hashes": [],
            "hessian": hessian, "hessians": [], "steps": 0, "carry": torch.zeros(0, device=device), "shards": 0,
            "method": method, "past": Past.none(device), **numbers, **({"rank": rank} if distribution == "factored" else {}),
        }  # fmt: skip


def on(device: torch.device, own: Any, copy: bool = False) -> Any:
    """A state, with its tensors on a device."""
    if isinstance(own, dict):
        return {name: on(device, x, copy) for name, x in own.items()}
    if isinstance(own, list):
        return [on(device, x, copy) for x in own]
    if isinstance(own, Past):
        return Past(on(device, own.streams, copy), on(device, own.coeffs, copy), own.steps)
    return own.to(device, copy=copy) if isinstance(own, Tensor) else own


_LISTS = {"residuals": "residual", "hessians": "hessian", "hashes": "hash"}  # by tensor, and a tensor's own


_LATER = ("rows", "padding", "scales")  # that a new optimizer's state does not have yet


class ByParameter(defaultdict[Any, Any]):
    """``state`` as torch's optimizers have it; under ``KEY``, which is not one of its keys, the whole state as one dict."""

    whole: Mapping[str, Any] = {}

    def __missing__(self, key: object) -> Any:
        """As a defaultdict, but for ``KEY``."""
        return self.whole if key == KEY else super().__missing__(key)


def entries(own: Mapping[str, Any], parameters: Sequence[Tensor]) -> list[dict[str, Any]]:
    """A state as an entry for each of these tensors; what a sharded one has is sharded as it is.

    Checkpoints are loaded into the state of a new optimizer, tensor by tensor and list by list, so that it must have all that
    a later one has, in the same lengths. What comes later, or has another length then, is in a string.
    """
    out: list[dict[str, Any]] = [{} for _ in own["counters"][1:]]
    for many, one in _LISTS.items():
        for entry, x in zip(out, own[many], strict=False):
            entry[one] = x
    for entry, p in zip(out, parameters, strict=True):
        if sharding.is_sharded(p):
            if "residual" in entry and p.itemsize == 2:
                entry["residual"] = sharding.like(p, entry["residual"])
            if "hessian" in entry:
                entry["hessian"] = [sharding.like(p, h) for h in entry["hessian"]]
    text = {"dtype": str(own["carry"].dtype).removeprefix("torch."), "values": own["carry"].tolist()}
    text |= {"past": past_of(own["past"])} | {k: own[k] for k in _LATER if k in own}
    out[0][KEY] = {k: v for k, v in own.items() if k not in (*_LISTS, *_LATER, "past")} | {"carry": json.dumps(text)}
    return out


def of_entries(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state in a saved state_dict, of this form or the one of earlier versions, one dict for the whole optimizer.

    Raises:
        ValueError: there is none.
    """
    found = state_dict.get("state", {})
    if isinstance(old := found.get(KEY), dict):
        return old | {"past": Past.none(torch.device("cpu"))}
    names = [name for group in state_dict.get("param_groups", ()) for name in group["params"]]
    given = [found.get(name, {}) for name in names]  # torch may leave out empty ones
    if not given or not isinstance(given[0].get(KEY), dict):
        raise ValueError(
            f"state_dict: expected an entry {KEY!r} in the state of the first parameter, as zo_core optimizers save, got entries "
            f"of {some([str(name) for name in found]) or 'no parameter'}"
        )
    own: dict[str, Any] = given[0][KEY] | {many: [e[one] for e in given if one in e] for many, one in _LISTS.items()}
    own["past"] = Past.none(torch.device("cpu"))
    if isinstance(own.get("carry"), str):
        text = json.loads(own["carry"])
        own["carry"] = torch.tensor(text["values"], dtype=getattr(torch, text["dtype"]), device="cpu")
        if "past" in text:  # not in states of earlier versions
            own["past"] = _past_from(text["past"], len(given))
        own |= {k: text[k] for k in _LATER if k in text}
        own |= {"scales": tuple(own["scales"])} if "scales" in own else {}
    return own


def _past_from(saved: Any, tensors: int) -> Past:
    """The inverse of ``past_of``, for so many tensors; ValueError where there is none."""
    try:
        steps = [(int(n), [int(i) for i in left_out]) for n, left_out in saved["steps"]]
        coeffs = torch.tensor(saved["coeffs"], dtype=torch.float32, device="cpu")
        past = Past(torch.tensor(saved["streams"], dtype=torch.int64, device="cpu"), coeffs, steps)
        sizes = len(past.streams), len(coeffs), sum(n for n, _ in steps)
        right = len(set(sizes)) == 1 and all(n >= 0 and set(left) <= set(range(tensors)) for n, left in steps)
    except (TypeError, KeyError, ValueError, RuntimeError):
        right = False
    if not right:
        raise ValueError(
            "state_dict: expected as many streams as coefficients of past probes, and as the steps have that they are of, got "
            f"{str(saved)[:200]}: it is damaged"
        )
    return past


def shards_of(saved: Mapping[str, Any], parameters: Sequence[Tensor], shards: int) -> dict[str, Any]:
    """A saved state with the residuals and Hessians of this process's shards of the parameters.

    Args:
        saved: from ``of_entries``. What it has of a sharded tensor is sharded too, or, in states of earlier versions, a shard.
        parameters: of the optimizer.
        shards: which these are, as the optimizer's own state has it.

    Raises:
        ValueError: they are of other shards.
    """
    own, found = dict(saved), [*saved["residuals"], *(x for h in saved["hessians"] for x in h)]
    if any(map(sharding.is_sharded, found)):
        first = (own["residuals"], [h[0] for h in own["hessians"]])
        pairs = [pair for many in first for pair in zip(many, parameters, strict=False)]
        other = any(sharding.is_sharded(x) and sharding.place(x) != sharding.place(p) for x, p in pairs)
    else:
        other = any(x.numel() for x in found) and 0 not in (shards, own["shards"]) and shards != own["shards"]
    if other:
        raise ValueError("state_dict: it is of other shards: each process goes on with the state that it saved")
    own["residuals"] = [sharding.local(x) for x in own["residuals"]]
    own["hessians"] = [[sharding.local(x) for x in h] for h in own["hessians"]]
    return own | {"shards": shards}


def check_saved(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """ValueError unless this is a state that an optimizer with the state ``own`` can go on with."""
    if (set(saved) ^ set(own)) - {"rank", *_LATER}:
        raise ValueError(
            f"state_dict: expected a state with {sorted(own)} as zo_core optimizers save, got {sorted(saved)}"
        )
    for name in ("method", "hessian"):
        if saved[name] != own[name]:
            raise ValueError(f"state_dict: expected {name} {own[name]!r}, got one of {saved[name]!r}")
    empty = [[r.numel() == 0 for r in state["residuals"]] for state in (own, saved)]
    if all(empty) and len(empty[0]) == len(empty[1]) and empty[0] != empty[1] and own["residual"] == saved["residual"]:
        raise ValueError(
            "state_dict: it is of weights of another dtype, as it has residuals, which 16-bit weights have, for other tensors: "
            "load it into a model of the dtype that it was saved from"
        )
    for name in ("residuals", "hessians"):
        mine, theirs = ([_shape(x) for x in state[name]] for state in (own, saved))
        if mine and theirs and mine != theirs:
            raise ValueError(f"state_dict: expected {name} of shapes {mine}, got {theirs}")


def _shape(x: Any) -> Any:
    return tuple(x.shape) if isinstance(x, Tensor) else [_shape(y) for y in x]


def names_of(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the tensors of parameter groups, or their places where they have none."""
    return [
        name
        for i, group in enumerate(groups)
        for name in group.get("param_names", (f"group {i} tensor {j}" for j in range(len(group["params"]))))
    ]


class Stateful(torch.optim.Optimizer):
    """A torch optimizer with such a state: what ``ZOOptimizer`` is beside its step."""

    module: nn.Module | None
    points_at_once: int | None
    stochastic_rounding: bool
    blocks: layers.Blocks | None
    processes: Parallel | None
    _own: dict[str, Any] = {}  # noqa: RUF012 (see ``new``; each object gets one of its own)
    _engine: Engine | None = None
    _asked: str | None = None  # the engine that the user named
    _in_place = False  # whether only weights that are written reach the forwards
    _exchange: Exchange | None = None
    _stepping = False
    evaluations = 0  # losses that this object's steps asked for; one call of the closure may give several
    _flat: Tensor | None = None  # int64 (2,): steps whose losses were all the same, and how many of the last steps
    _warned_of_flat_steps = False
    noise_floor: float | None = None  # the forward's rounding error in a difference of two losses, where it is known
    _below: Tensor | None = None  # int64 (2,): probes whose difference was smaller than that, and all of them
    _versions: list[tuple[object, ...]] | None = (
        None  # of the tensors after the last step; None since a state was loaded
    )

    @property
    def engine(self) -> str:
        """The engine's name. Where the user named none, the noise decides, also that of a loaded state: a run goes on as it began."""
        chosen = "inplace" if self._in_place else "grouped" if self._own["distribution"] == "factored" else "shadow"
        return self._asked or chosen

    @property
    def fallback(self) -> str | None:
        """Why the grouped engine cannot serve the closure and leaves it to the shadow engine, as its warning says; None where it can."""
        found: str | None = getattr(self._engine, "fallback", None)
        return found

    # ---- the tensors -------------------------------------------------------------------------------------------

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _tensors(self) -> list[Tensor]:
        """Their memory in this process: shards of those that are sharded."""
        return [sharding.local(p) for p in self._parameters()]

    def _names(self) -> list[str]:
        return names_of(self.param_groups)

    # ---- the state ---------------------------------------------------------------------------------------------

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state by parameter, made anew each time: see ``entries``."""
        found, parameters = ByParameter(dict), self._parameters() if self._own else []
        if self._own:
            found.update(zip(parameters, entries(self._own, parameters), strict=True))
            found.whole = self._own
        return found

    @state.setter
    def state(self, value: object) -> None:
        """Nothing: torch sets an empty one, and ``load_state_dict`` takes what is saved."""

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
    def flat(self) -> int:
        """Steps of this object, made or loaded, whose losses were the same at all points (waits for the device)."""
        return int(self._flat[0]) if self._flat is not None else 0

    def _count_flat(self, losses: Tensor) -> None:
        """Count a step whose losses, (closures, points), are the same at all points; the tenth in a row is worth a warning."""
        before = torch.zeros(2, dtype=torch.int64, device=losses.device) if self._flat is None else self._flat
        alone = losses.shape[1] == 1
        same = torch.zeros((), dtype=torch.bool, device=losses.device) if alone else (losses == losses[:, :1]).all()
        self._flat = torch.stack((before[0] + same, (before[1] + 1) * same))
        if (
            (losses.device.type == "cpu" or self._steps % _FLAT == 0)
            and not self._warned_of_flat_steps
            and self._flat[1] >= _FLAT
        ):
            self._warned_of_flat_steps = True
            warn(
                f"step: the losses of the last {int(self._flat[1])} steps were the same at all probes, so nothing was learned. "
                "The loss does not depend on the trained tensors (it is a constant, or reads other tensors: replaced ones, "
                "another adapter's, those of another process), or eps is too small for a change to show",
            )

    @property
    def below_floor(self) -> tuple[int, int]:
        """Probes of this object's steps whose difference of losses was below ``noise_floor``, and all that were counted (waits for the device).

        They are counted while ``noise_floor`` is a number, such as the ``error`` of one eps that ``zo_core.measure`` found.
        """
        below, probes = (0, 0) if self._below is None else self._below.tolist()
        return below, probes

    def _count_below(self, differences: Tensor, floor: float) -> None:
        """Count the differences of losses of a step, (n,), and those below a floor."""
        below = (differences.abs() < floor).sum()
        counts = torch.stack((below, torch.full_like(below, len(differences))))
        self._below = counts if self._below is None else self._below + counts

    @property
    def _steps(self) -> int:
        return int(self._own["steps"])

    @property
    def scales(self) -> dict[str, float]:
        """Sigma of each tensor's probe, by name.

        They may be set anew, as the option ``scales`` takes them; a journal that began with others then refuses the next step.
        """
        return dict(zip(names := self._names(), self._own.get("scales") or (1.0,) * len(names), strict=True))

    @scales.setter
    def scales(self, value: Scales | None) -> None:
        if self._stepping:
            raise RuntimeError("scales: set from inside the closure, in the middle of a step")
        self._set_scales(value, normalize=True)

    def _set_scales(self, given: Scales | None, normalize: bool) -> None:
        others = [] if self.module is None else [n for n, _ in self.module.named_parameters(remove_duplicate=False)]
        found = resolve(given, self._names(), [p.numel() for p in self._parameters()], others, normalize)
        self._own.pop("scales", None)
        self._own |= {"scales": found} if found else {}
        self._engine = None
        if self._exchange is not None:
            self._exchange.compared = False

    @property
    def saturated(self) -> dict[str, int]:
        """By tensor, how often a weight was beyond its dtype's range and set to its largest value (waits for the device)."""
        counts = self._own["counters"][1:].tolist()
        return {name: n for name, n in zip(self._names(), counts, strict=True) if n}

    def memory(self) -> dict[str, int]:
        """Bytes: ``weights`` that are trained, their ``residuals``, ``hessians``, and what the engine took beside them, at most so far."""
        return {
            "weights": sum(p.nbytes for p in self._tensors()),
            "residuals": sum(r.nbytes for r in self._own["residuals"]),
            "hessians": sum(t.nbytes for h in self._own["hessians"] for t in h),
            **(self._engine.memory() if self._engine is not None else {}),
        }

    def _refuse_inside(self, what: str) -> None:
        if self._stepping:
            raise RuntimeError(
                f"{what}: called from inside the closure, in the middle of a step: call it between steps"
            )

    def state_dict(self) -> dict[str, Any]:
        """As torch's; with residuals there are hashes of the weights they belong to. Not inside a closure."""
        self._refuse_inside("state_dict")
        hashes, tensors = self._own["hashes"], self._tensors()
        if self._versions is not None or not hashes:  # else it was loaded, and so were its hashes
            hashes = hashes_of(self._parameters(), self._own["residuals"])
        if self._versions is not None:  # a residual whose weight was written since is of no weight that there is now
            changed = [a != b for a, b in zip(self._versions, versions_of(tensors), strict=False)]
            hashes = [-1 if new and h is not None else h for h, new in zip(hashes, changed, strict=False)]

        def complete(_: object, found: dict[str, Any]) -> None:
            for i, x in enumerate(hashes):
                found["state"][i]["hash"] = x
            own = found["state"][0][
                KEY
            ]  # its small tensors do not go on with the optimizer, as residuals and Hessians do
            own |= {name: x.clone() for name, x in own.items() if isinstance(x, Tensor)}

        handle = self.register_state_dict_post_hook(complete, prepend=True)  # before those of users
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; the run continues bit for bit. ValueError if it is not a state of such an optimizer."""
        self._refuse_inside("load_state_dict")
        saved: dict[str, Any] = {}

        def take(_: object, given: dict[str, Any]) -> dict[str, Any]:
            found = of_entries(given)
            if (mine := self._own.get("scales")) and (differ := compare(mine, found.get("scales", ()), self._names())):
                raise ValueError(
                    f"state_dict: scales: {differ}: make the optimizer with the scales of the run that goes on, or without "
                    "scales=, so that it takes those of the state"
                )
            if "residuals" in found and "hessians" in found:
                found = shards_of(found, self._parameters(), self._own["shards"])
            check_saved(found, self._own)
            if "padding" in self._own:  # an earlier version, or a model without ``padding_idx``, trained these rows
                found = {"padding": False} | found
            saved.update({**{name: found[name] for name in self._own if name in found}, **found})
            groups = [{**self.defaults, **group} for group in given["param_groups"]]  # options newer than the state
            return given | {"state": {}, "param_groups": groups}  # torch would cast a state to the dtype of the weights

        def put(_: object) -> None:
            with torch.inference_mode(False):
                self._own = on(self._tensors()[0].device, saved, copy=True)
            self._engine = self._versions = None
            if self._exchange is not None:
                self._exchange.compared = False

        handles = (  # after and before those of users
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(put, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: the engine is rebuilt."""
        self._refuse_inside("deepcopy, pickle")
        names = "stochastic_rounding", "blocks", "_asked", "_in_place", "points_at_once", "module", "processes"
        return {name: getattr(self, name) for name in (*names, "_own", "param_groups", "defaults")}

    # ---- what a journal asks -----------------------------------------------------------------------------------

    def _identity(self) -> Identity:
        space = self._engine.space if self._engine is not None else self._space()
        return identity_of(self._own, self.param_groups, self._names(), self.engine, space.padding)

    def _settings(self) -> dict[str, Any]:
        options = {k: v for k, v in self.param_groups[0].items() if isinstance(v, str | int | float)}
        return options | {"stochastic_rounding": self.stochastic_rounding}

    def _keep_padding(self, keep: bool) -> bool:
        """Whether padding rows stay as they are from now on. Returns whether they did."""
        before = bool(self._own.get("padding"))
        if "padding" in self._own and keep != before:
            self._own["padding"], self._engine = keep, None
        return before

    def _space(self) -> ParamSpace:
        raise NotImplementedError

    @property
    def _remembered(self) -> int:
        """The number of steps whose probes the next step goes along again."""
        first = self.param_groups[0]
        return int(first["window"]) - 1 if first["momentum"] or first.get("beta2") else 0

    def _catch_up(self, play: Callable[[ParamSpace], Progress], steps: int) -> None:
        """Take steps that ``play`` makes again."""
        space, own = self._space(), self._own
        with uninterrupted(), torch.no_grad():
            stream, updates, skipped, own["carry"], past = play(space)
            own["past"] = on(space.counters.device, past.last(self._remembered))
            for name, value in (("stream", stream), ("updates", updates), ("skipped", skipped)):
                own[name].fill_(value)
            own["steps"] = steps
            self._versions = versions_of(self._tensors())
