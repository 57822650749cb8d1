"""Choosing a learning rate and eps: short runs on a validation split, bad ones stopped early."""

from __future__ import annotations

import math
from collections.abc import Callable


def ladder(loss: Callable[[float], float], start: float, factor: float = 10**0.5, most: int = 6) -> dict[float, float]:
    """Losses of values around a start: its neighbours first, then further in the direction that is better.

    Args:
        loss: of a value; not finite is worst.
        start: the value in the middle.
        factor: between neighbours.
        most: values that are tried, at least 3.

    Returns:
        Losses by value, in the order tried; the least of them has worse neighbours unless ``most`` ended the search.
    """
    found: dict[int, float] = {}

    def at(rung: int) -> float:
        if rung not in found:
            value = loss(_round(start * factor**rung))
            found[rung] = value if math.isfinite(value) else math.inf
        return found[rung]

    for rung in (0, -1, 1):
        at(rung)
    while len(found) < most:
        best = min(found, key=lambda rung: found[rung])
        if best not in (min(found), max(found)):
            break
        at(best + (1 if best == max(found) else -1))
    return {_round(start * factor**rung): value for rung, value in found.items()}


def _round(x: float) -> float:
    return float(f"{x:.2g}")
