"""How a closure is evaluated: each evaluation of a step meets the same conditions, and returns a scalar."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import sharding
from .weights import ParamSpace, modules_of, some, versions_of


class Evaluation:
    """A closure, called at every point of a step as at the first one.

    torch's generators are rewound, so that dropout is the same; buffers are put back, so that the statistics of batch
    norms are those before the step; and casts and parametrizations that torch keeps of other weights are forgotten.

    Args:
        closure: what the user gave: it returns the loss at the weights as they are read. Where a step has several, it is set
            to each in turn.
        device: of the weights.
        units: parts of the module that FSDP2 gathers.
        buffers: those of the module.
        written_in_place: the weights, if the engine itself writes them to perturb them, so that the closure must not.
    """

    def __init__(
        self, closure: Callable[[], object], device: torch.device, units: Sequence[Any], buffers: "Buffers",
        written_in_place: ParamSpace | None = None,
    ) -> None:  # fmt: skip
        self.closure, self.device, self.units, self.buffers = closure, device, units, buffers
        self.space = written_in_place
        self.calls = 0  # of the closure
        self.cpu_generator = torch.get_rng_state()
        self.cuda_generator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        buffers.begin()

    def __call__(self) -> Tensor:
        """The loss, 0-dimensional, float32 or float64, on the device. TypeError, ValueError if it is no scalar."""
        self.rewind()
        self.buffers.put_back()
        forget_casts()
        sharding.reshard(self.units)
        before = versions_of(self.space.tensors) if self.space is not None else []
        self.calls += 1
        try:
            result = self.closure()
        finally:
            self.buffers.look()
        if self.space is not None and before != (after := versions_of(self.space.tensors)):
            names = [n for n, x, y in zip(self.space.names, before, after, strict=True) if x != y]
            raise RuntimeError(
                f"closure: it wrote {some(names)} during an evaluation, when the weights are perturbed: the weight is now what it "
                "wrote, less the perturbation. Write weights outside opt.step only"
            )
        return scalar(result, self.device)

    def rewind(self) -> None:
        """Set torch's generators to where the step found them."""
        torch.set_rng_state(self.cpu_generator)
        if self.cuda_generator is not None:
            torch.cuda.set_rng_state(self.cuda_generator, self.device)


def forget_casts() -> None:
    """Forget what torch keeps of weights that change: autocast's casts, and what ``parametrize.cached()`` computed once."""
    torch.clear_autocast_cache()
    if (module := sys.modules.get("torch.nn.utils.parametrize")) is not None:
        module._cache.clear()


class _Saved(NamedTuple):
    owner: dict[str, Any]  # ``_buffers`` of a module
    name: str
    buffer: Tensor
    version: int
    value: Tensor  # before the step

    @property
    def key(self) -> tuple[int, str]:
        return id(self.owner), self.name


_DTYPES = {getattr(torch, f"{kind}{bits}") for kind in ("float", "int") for bits in (16, 32, 64)} | {
    torch.bfloat16, torch.complex64, torch.complex128, torch.int8, torch.uint8, torch.bool,
}  # fmt: skip


def _is_watched(b: Tensor) -> bool:
    """Whether a buffer is an ordinary tensor. Sparse, nested and 4-bit ones, for example, can be neither compared nor chosen from."""
    ordinary = type(b) in (Tensor, nn.Buffer) and b.dtype in _DTYPES and b.layout is torch.strided
    return ordinary and not (b.is_meta or b.is_nested or b.is_inference())


class Buffers:
    """The ordinary buffers of a module, which have the same values at the start of every evaluation of a step.

    Until a step is done, each copies all buffers, to find out which of them a forward writes; so does the next step after a module
    was switched between training and evaluation. Other steps copy only the buffers that were written before. Where all are
    copied, their values are compared as well, as torch's batch norm writes its statistics without a change of ``_version``.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self.module = module
        self.mode: list[bool] | None = None  # of all modules, in the last step that was done
        self.moving = set[tuple[int, str]]()  # those that a forward has written
        self.saved: list[_Saved] = []
        self.all = False  # whether all are saved

    def begin(self) -> None:
        """Save the values of the buffers that a closure may write."""
        modules = modules_of(self.module)
        self.saved, self.all = [], self.mode != [m.training for m in modules]
        for m in modules if self.all or self.moving else ():
            for name, b in m._buffers.items():
                if b is not None and _is_watched(b) and (self.all or (id(m._buffers), name) in self.moving):
                    self.saved.append(_Saved(m._buffers, name, b, b._version, b.clone()))

    def look(self) -> None:
        """Find out which of the saved buffers have been written or replaced."""
        for s in self.saved:
            if s.key not in self.moving:
                written = s.owner.get(s.name) is not s.buffer or s.buffer._version != s.version
                if written or (self.all and not torch.equal(s.buffer, s.value)):
                    self.moving.add(s.key)

    def put_back(self) -> None:
        """Give the buffers that were written their values from before the step."""
        for s in self.saved:
            if s.key in self.moving:
                s.owner[s.name] = s.buffer
                s.buffer.copy_(s.value)

    def end(self, moved: Tensor) -> None:
        """After the step: buffers keep the values of the last evaluation if it moved the weights, and else those from before."""
        for s in self.saved:
            now = s.owner.get(s.name)
            if s.key in self.moving and now is not None and (now.shape, now.dtype) == (s.value.shape, s.value.dtype):
                now.copy_(torch.where(moved.to(now.device), now, s.value))
        self.saved, self.mode = [], [m.training for m in modules_of(self.module)]


def scalar(loss: object, device: torch.device) -> Tensor:
    """The loss that a closure returned, as a tensor (), float32 or float64. TypeError, ValueError if it is no real scalar."""
    if not isinstance(loss, Tensor | float | int) and not hasattr(loss, "__float__"):
        raise TypeError(f"closure: expected it to return a scalar loss, got {type(loss).__name__}; return the loss")
    value = loss if isinstance(loss, Tensor) else torch.tensor(float(loss), dtype=torch.float64, device="cpu")  # type: ignore[arg-type]
    if value.numel() != 1 or value.is_complex():
        raise ValueError(f"closure: expected a real scalar loss, got {value.dtype} of shape {tuple(value.shape)}")
    if sharding.is_sharded(value):
        value = value.full_tensor()  # type: ignore[attr-defined]
    return value.detach().reshape(()).to(device, torch.promote_types(value.dtype, torch.float32))
