"""The losses at the points that a method asks for: from the engine of this process, or from all processes together."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..closure import Evaluation
from ..distributed import Exchange
from ..engines.base import Engine
from ..weights import Point, Probe

Closure = Callable[[], Tensor | float]


class StepLosses:
    """What gives a method its losses in a step (``estimators.Losses``).

    Args:
        engine: evaluates the closures.
        evaluation: how each of them is called.
        closures: one for all points, or one for each set of points that this process evaluates.
        spread: whether it is the latter.
        left_out: numbers of the tensors that the step leaves out.
        exchange: joins the processes, where there are several.
        number: of the step.
    """

    def __init__(
        self, engine: Engine, evaluation: Evaluation, closures: Sequence[Closure], spread: bool, left_out: set[int],
        exchange: Exchange | None, number: int,
    ) -> None:  # fmt: skip
        self.engine, self.evaluation, self.closures, self.spread = engine, evaluation, closures, spread
        self.left_out, self.exchange, self.number = left_out, exchange, number
        self.seen: list[Tensor] = []  # what each call returned
        self._asked: list[Sequence[Sequence[Point]]] = []  # and the points that it was for
        self._before = 0  # calls of the closures when the evaluation of these points began

    def __call__(self, sets: Sequence[Sequence[Point]]) -> Tensor:
        """Losses at sets of as many points each, (sets, points)."""
        shared = sets if self.spread else [[point] for point in sets[0]]  # what processes divide among them
        if self.exchange is None:
            found = self._evaluate(shared)
        else:
            found = self.exchange.losses(self._evaluate, self._pass_by, shared, self.number)
        self.seen.append(found.view(len(sets), -1))
        self._asked.append(sets)
        return self.seen[-1]

    def differences(self) -> Tensor:
        """Differences of losses, (n,): for each probe between its two sides, or between the one and theta."""
        found = []
        for sets, losses in zip(self._asked, self.seen, strict=True):
            for points, row in zip(sets, losses, strict=True):
                places: dict[Probe | None, list[int]] = {}
                for place, (_, probe) in enumerate(points):
                    places.setdefault(probe, []).append(place)
                clean = places.pop(None, [])[:1]
                pairs = [pair for own in places.values() if len(pair := (*own, *clean)[:2]) == 2]
                if pairs:
                    one, other = torch.tensor(pairs, device=row.device).unbind(1)
                    found.append(row[one] - row[other])
        return torch.cat(found) if found else torch.empty(0, device=self.evaluation.device)

    def _evaluate(self, sets: Sequence[Sequence[Point]]) -> Tensor:
        """Losses at all points of these sets, (n,)."""
        self._before = self.evaluation.calls
        sets = sets if self.spread else [_flat(sets)]
        found = []
        for closure, points in zip(self.closures, sets, strict=True):
            self.evaluation.closure = closure
            found.append(self.engine.evaluate_all(self.evaluation, points, self.left_out))
        return torch.cat(found)

    def _pass_by(self, sets: Sequence[Sequence[Point]]) -> None:
        """After an error, move the weights through the remaining points: each move rounds, and other processes make all of them."""
        engine = self.engine
        if engine.writes_weights:
            for c, probe in _flat(sets)[self.evaluation.calls - self._before :]:
                engine.evaluate(lambda: engine.space.counters, c, probe, self.left_out)


def _flat(sets: Sequence[Sequence[Point]]) -> list[Point]:
    return [point for points in sets for point in points]


def closures_of(given: object, probes: int, shares: int) -> Sequence[Closure]:
    """The closures of a step: one for all probes, or one for each.

    Args:
        given: what the user gave.
        probes: of the step.
        shares: how many processes divide them among themselves.

    Raises:
        TypeError, ValueError: it is neither a function nor as many of them as this process has probes.
    """
    if callable(given):
        return [given]
    if not isinstance(given, list | tuple):
        raise TypeError(
            f"closure: expected a function that returns the loss, or a list of them, one for each probe, got {given!r}"
        )
    for i, closure in enumerate(given):
        if not callable(closure):
            raise TypeError(f"closure {i}: expected a function that returns the loss, got {closure!r}")
    if probes % shares:
        raise ValueError(
            f"probes: expected a multiple of {shares}, as so many processes share them and each probe has a closure of its "
            f"own, got {probes}"
        )
    if len(given) != probes // shares:
        which = f"one for each of the {probes} probes" + f" that are this process's, 1/{shares} of them" * (shares > 1)
        raise ValueError(
            f"closure: expected {probes // shares} functions, {which}, got {len(given)}: give as many, or one function "
            "for all probes"
        )
    return given
