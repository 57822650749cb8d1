"""Engines: how a perturbation reaches the forward pass."""

from torch import nn

from ..weights import ParamSpace
from .base import Engine
from .inplace import InPlaceEngine
from .shadow import ShadowEngine

ENGINES = ("shadow", "inplace")
NEED_MODULE = ("shadow",)  # as they perturb what modules read


def make(name: str, space: ParamSpace, module: nn.Module | None) -> Engine:
    """The engine of this name over a space, which must be of a module where it is one of ``NEED_MODULE``."""
    if name == "inplace":
        return InPlaceEngine(space)
    assert module is not None
    return ShadowEngine(space, module)
