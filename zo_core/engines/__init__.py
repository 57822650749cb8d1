"""Engines: how a perturbation reaches the forward pass."""

from torch import nn

from ..weights import ParamSpace
from .base import Engine
from .grouped import GroupedEngine
from .inplace import InPlaceEngine
from .shadow import ShadowEngine

ENGINES = ("shadow", "inplace", "grouped")
NEED_MODULE = ("shadow", "grouped")  # as they perturb what modules read


def make(
    name: str, space: ParamSpace, module: nn.Module | None, points_at_once: int | None = None, named: bool = True
) -> Engine:
    """The engine of this name over a space, which must be of a module where it is one of ``NEED_MODULE``; ``named``: by the user."""
    if name == "inplace":
        return InPlaceEngine(space)
    assert module is not None
    if name == "grouped":
        return GroupedEngine(space, module, points_at_once, named)
    return ShadowEngine(space, module)
