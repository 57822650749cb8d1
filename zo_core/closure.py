"""How a closure is evaluated: in each evaluation of a step it meets the same conditions, and returns a scalar."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import sharding


class Evaluation:
    """A closure, called at every point of a step as at the first one: torch's generators are rewound, so dropout is the same.

    Args:
        closure: what the user gave: it returns the loss at the weights as they are read.
        device: of the weights.
        units: parts of the module that FSDP2 gathers.
    """

    def __init__(self, closure: Callable[[], object], device: torch.device, units: Sequence[Any]) -> None:
        self.closure, self.device, self.units = closure, device, units
        self.cpu_generator = torch.get_rng_state()
        self.cuda_generator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def __call__(self) -> Tensor:
        """The loss, 0-dimensional, float32 or float64, on the device. TypeError, ValueError if it is no scalar."""
        self.rewind()
        torch.clear_autocast_cache()  # it knows parameters by their identity, not by their values
        sharding.reshard(self.units)
        return scalar(self.closure(), self.device)

    def rewind(self) -> None:
        """Set torch's generators to where the step found them."""
        torch.set_rng_state(self.cpu_generator)
        if self.cuda_generator is not None:
            torch.cuda.set_rng_state(self.cuda_generator, self.device)


def scalar(loss: object, device: torch.device) -> Tensor:
    """What a closure returned as a tensor, (), float32 or float64. TypeError, ValueError if it is no real scalar."""
    if not isinstance(loss, Tensor | float | int) and not hasattr(loss, "__float__"):
        raise TypeError(f"closure: expected it to return a scalar loss, got {type(loss).__name__}; return the loss")
    value = loss if isinstance(loss, Tensor) else torch.tensor(float(loss), dtype=torch.float64, device="cpu")  # type: ignore[arg-type]
    if value.numel() != 1 or value.is_complex():
        raise ValueError(f"closure: expected a real scalar loss, got {value.dtype} of shape {tuple(value.shape)}")
    if sharding.is_sharded(value):
        value = value.full_tensor()  # type: ignore[attr-defined]
    return value.detach().reshape(()).to(device, torch.promote_types(value.dtype, torch.float32))
