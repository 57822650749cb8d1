"""The interface of engines, and how they hold back signals while weights change."""

import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..weights import ParamSpace, Point, Probe, Update

_SIGNALS = tuple(map(int, signal.valid_signals()))


class Engine(ABC):
    """How a perturbation reaches a forward pass."""

    writes_weights: ClassVar[bool] = False  # whether weights are not theta while the closure runs
    space: ParamSpace
    rows: int = 0  # of the largest product so far, in engines that choose by it; saved with the optimizer

    @abstractmethod
    def evaluate(
        self, closure: Callable[[], Tensor], c: float, probe: Probe | None, leave_out: Collection[int] = ()
    ) -> Tensor:
        """The closure's result at theta + c z(probe), z = 0 in tensors left out; at theta without a probe."""

    def evaluate_all(
        self, closure: Callable[[], Tensor], points: Sequence[Point], leave_out: Collection[int] = ()
    ) -> Tensor:
        """The closure's results at all of these points, (n,): here one call of it after the other."""
        return torch.stack([self.evaluate(closure, c, probe, leave_out) for c, probe in points])

    def settle(self) -> None:  # noqa: B027 - most engines have no choice
        """Choose how to evaluate until the next call: once a step, so that all its losses have the same rounding."""

    @abstractmethod
    def update(self, probes: Sequence[Probe], update: Update, rounding: Tensor | None) -> None:
        """Move the weights, from theta; ``rounding`` is the stream of the stochastic rounding, None rounds to nearest."""

    @abstractmethod
    def restore(self) -> None:
        """Give the weights their values theta again, whatever evaluation was interrupted."""

    @abstractmethod
    def memory(self) -> dict[str, int]:
        """Bytes that this engine holds beside the weights, the most so far."""


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C and all signals that Python code handles: weights and what is known of them change together."""
    if threading.current_thread() is not threading.main_thread():  # which runs all handlers
        yield
        return
    handlers = {number: h for number in _SIGNALS if callable(h := signal.getsignal(number))}
    arrived: list[tuple[int, FrameType | None]] = []
    try:
        for number in handlers:
            signal.signal(number, lambda *args: arrived.append(args))
        yield
    finally:
        try:
            _put_back(handlers)
        finally:
            _deliver(arrived, handlers)


_Handlers = dict[int, Callable[[int, FrameType | None], Any]]


def _put_back(handlers: _Handlers) -> None:
    """Set all handlers again, also if one that is set already is called meanwhile and raises."""
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    except BaseException:
        _put_back(handlers)
        raise


def _deliver(arrived: list[tuple[int, FrameType | None]], handlers: _Handlers) -> None:
    """Call the handlers of all signals that were held back, also after one of them has raised."""
    if arrived:
        number, frame = arrived.pop(0)
        try:
            handlers[number](number, frame)
        finally:
            _deliver(arrived, handlers)
