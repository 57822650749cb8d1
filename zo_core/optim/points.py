"""The losses at the points that a method asks for: from the engine of this process, or from all processes together."""

from collections.abc import Sequence

from torch import Tensor

from ..closure import Evaluation
from ..distributed import Exchange
from ..engines.base import Engine
from ..engines.inplace import InPlaceEngine
from ..estimators import Losses
from ..weights import Point


def losses_of(
    engine: Engine, evaluation: Evaluation, left_out: set[int], exchange: Exchange | None, number: int, seen: list[Tensor]
) -> Losses:  # fmt: skip
    """What gives a method its losses in a step.

    Args:
        engine: evaluates the closure.
        evaluation: the closure.
        left_out: numbers of the tensors that the step leaves out.
        exchange: joins the processes, where there are several.
        number: of the step.
        seen: gets the losses of each call.
    """
    before = 0  # calls of the closure when the evaluation of these points began

    def evaluate(points: Sequence[Point]) -> Tensor:
        nonlocal before
        before = evaluation.calls
        return engine.evaluate_all(evaluation, points, left_out)

    def pass_by(points: Sequence[Point]) -> None:
        if isinstance(engine, InPlaceEngine):  # going there and back rounds, as it does in other processes
            for c, probe in points[evaluation.calls - before :]:
                engine.evaluate(lambda: engine.space.counters, c, probe, left_out)

    def losses(points: Sequence[Point]) -> Tensor:
        if exchange is None:
            seen.append(evaluate(points))
        else:
            seen.append(exchange.losses(evaluate, pass_by, points, number))
        return seen[-1]

    return losses
