"""The tensors that an optimizer trains: which they are, whether they can be trained, and the engine that is made for them."""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from .. import engines, layers, sharding
from ..distributed import check
from ..engines.base import Engine
from ..weights import (
    ParamSpace,
    check_absent,
    clear_residuals,
    hashes_of,
    inside,
    is_other,
    padding_of,
    some,
    space_of,
    versions_of,
)
from . import state
from .options import Shared, check_group
from .state import Stateful


def refuse_meta(named: Iterable[tuple[str, Tensor]]) -> None:
    """ValueError if one of these tensors has no memory."""
    if found := [name for name, p in named if p.is_meta]:
        raise ValueError(
            f"params: {some(found)} on the meta device, where there is nothing to train: load the weights before the optimizer "
            "is made, and leave them there"
        )


class Tensors(Stateful):
    """The part of an optimizer that looks after its tensors, which are numbered by their ids in the noise and may change between steps."""

    _shared: ClassVar[tuple[Shared, ...]] = ()
    _units: Sequence[Any] = ()  # parts of the module that FSDP2 gathers
    _blocks: Sequence[set[int]] = ()  # numbers of the tensors of each block, from which a step may leave some out
    _of_module: set[int] | None = None  # numbers of the tensors that the module had at the last step
    _made_for: list[tuple[object, ...]] | None = None  # the value of ``_layout_of`` for which the engine was made

    def _check_tensors(self) -> set[int]:
        """Numbers of the frozen tensors. Refuses tensors that cannot be trained any longer, and warns of those that the module no longer has."""
        parameters, names = self._parameters(), self._names()
        if len(parameters) < (known := len(self._own["counters"]) - 1):
            raise RuntimeError(
                f"param_groups: expected the {known} tensors that the optimizer has, got {len(parameters)}: noise and state go by "
                "their numbers; freeze a tensor (requires_grad_(False)) instead of removing it, or make a new optimizer"
            )
        refuse_meta(zip(names, parameters, strict=True))
        frozen = {i for i, p in enumerate(parameters) if not p.requires_grad}
        if len(frozen) == len(parameters):
            raise RuntimeError(
                f"params: {some(names)} are all frozen now (requires_grad=False), so that there is nothing to train: unfreeze "
                "some, or make an optimizer of the parameters that are to be trained"
            )
        if self.module is not None:
            found = inside(self.module, parameters)
            gone, self._of_module = (self._of_module or set()) - found, found
            if gone:
                check_absent(self.module, names, sorted(gone))
        return frozen

    def _clear_residuals(self) -> None:
        """Zero the residuals of weights that somebody else has written."""
        own, versions = self._own, versions_of(self._tensors())
        if self._versions is None:  # since a state was loaded: are these the weights it was saved with?
            pairs = zip(hashes_of(self._parameters(), own["residuals"]), own["hashes"], strict=False)
            written = [is_other(saved, now) for now, saved in pairs]
        else:
            written = [a != b for a, b in zip(self._versions, versions, strict=False)]
        clear_residuals(self._names(), own["residuals"], written)
        self._versions, own["hashes"] = versions, []

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, without frozen tensors. The tensors' ids in the noise continue those of the groups before."""
        self._refuse_inside("add_param_group")
        given = param_group["params"]
        given = [given] if isinstance(given, Tensor) else list(given)
        for p in given:
            if not isinstance(p[1] if isinstance(p, tuple) and len(p) == 2 else p, Tensor):
                raise TypeError(f"params: expected tensors or (name, tensor) pairs, got {p!r}")
        keep = [p for p in given if (p[1] if isinstance(p, tuple) else p).requires_grad]
        if not keep:
            raise ValueError(f"params: expected tensors with requires_grad=True to train, got {len(given)} frozen ones")
        refuse_meta(p if isinstance(p, tuple) else (f"tensor {i}", p) for i, p in enumerate(keep))
        if self.param_groups and "param_names" in self.param_groups[0] and not isinstance(keep[0], tuple):
            names = {id(p): name for name, p in self.module.named_parameters()} if self.module is not None else {}
            start = f"group {len(self.param_groups)} tensor "
            keep = [(names.get(id(p), f"{start}{j}"), p) for j, p in enumerate(keep)]
        super().add_param_group({**param_group, "params": keep})
        group = self.param_groups[-1]
        try:
            check_group(group, self._shared)
            for name in (option.name for option in self._shared):
                if group[name] != (first := self.param_groups[0][name]):
                    raise ValueError(f"{name}: expected {first} as in the first group, got {group[name]}")
            if len(self.param_groups) > 1 and self._own:
                self._check_processes(self._own["hessian"])
                self._engine = self._of_module = None
                self._prepare()
                count = len(self._names())
                self._own["past"] = self._own["past"].without(range(count - len(group["params"]), count))
        except BaseException:
            self.param_groups.pop()
            raise

    def _check_processes(self, hessian: str | None) -> None:
        check(self.processes, self._names(), self._parameters(), self.module, self.engine, hessian)

    def _prepare(self) -> Engine:
        """The engine for the tensors as they are now, a new one if they have changed. Residuals of weights that others wrote become zero."""
        sharding.reshard(self._units)
        tensors = self._tensors()
        if self._own["stream"].device != (device := tensors[0].device):  # the model has moved
            self._own = state.on(device, self._own)
            self._engine, self._versions = None, versions_of(tensors)
        if self._own["residuals"]:
            self._clear_residuals()
        if self._engine is None or self._layout_of(tensors) != self._made_for:
            self._units = sharding.units(self.module)
            sharding.reshard(self._units)
            parameters = self._parameters()
            rows = padding_of(self.module, parameters)
            if rows and not self._own.setdefault("padding", True):
                rows = {}  # as in the run that this one continues
            space = space_of(self._names(), parameters, self._own, rows)
            self._blocks = ()
            self._left_out()
            space.warn_of_small_eps(self.param_groups[0]["eps"])
            named = self._asked is not None or self.points_at_once is not None
            self._engine = engines.make(self.engine, space, self.module, self.points_at_once, named)
            self._engine.rows = self._own.get("rows", 0)
            self._versions, self._made_for = versions_of(space.tensors), self._layout_of(space.tensors)
        return self._engine

    def _layout_of(self, tensors: Sequence[Tensor]) -> list[tuple[object, ...]]:
        """What an engine depends on: which tensors there are, and where the memory of shards is. A change needs a new engine."""
        pairs = zip(tensors, self._parameters(), strict=True)
        return [(id(p), t.dtype, t.shape, t.device, None if t is p else t.data_ptr()) for t, p in pairs]

    def _space(self) -> ParamSpace:
        return self._prepare().space

    def _left_out(self) -> set[int]:
        """Numbers of the tensors that this step leaves out."""
        rho = self.param_groups[0]["rho"]
        if (rho or self.blocks is not None) and not self._blocks:
            found = layers.find_blocks(self.module, self.blocks)
            self._blocks = layers.tensors_of(found, self._parameters(), self.module)
        return layers.left_out(self._blocks, rho, seed=self.seed, step=self._steps)
