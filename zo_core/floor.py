"""How large eps may and must be: what the differences of losses consist of, over a ladder of eps.

Too small an eps, and a difference of two losses is mostly the forward's own rounding; too large, and it is mostly the loss's
curvature. ``measure`` says how much of each there is, for any closure, without a second model of higher precision.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .bindings.warn import warn
from .optim.base import ZOOptimizer
from .optim.points import Closure

LADDER = tuple(10 ** (half / 2) for half in range(-10, -1))  # 1e-5 to 1e-1 in half decades
_FEWEST = 4  # values of eps: two to extrapolate slopes from, one that must agree with them, and one below
_GOOD = 0.98  # of the progress of the best eps, of which a good one has at least as much
_POOLED = 3  # values of eps below those two, whose errors stand for that at larger ones


class Differences(NamedTuple):
    """Differences of losses at one eps, over the probes: two-sided, l(eps) - l(-eps), or one-sided, l(eps) - l(0)."""

    rms: float
    bias: float  # RMS of what is in them beside slope and rounding: third order, and of one-sided ones curvature
    correlation: float  # with the slopes; its square is the progress of a step, over that of one with exact slopes
    below: float  # share of those that are smaller than the rounding error


class Rung(NamedTuple):
    """One eps of the ladder."""

    eps: float
    error: float  # RMS of the forward's rounding in the difference of two losses
    two_sided: Differences
    one_sided: Differences


@dataclass(frozen=True)
class Measurement:
    """What ``measure`` found."""

    rungs: tuple[Rung, ...]  # from the smallest eps to the largest at which all losses were finite
    recommended: dict[str, float]  # "two-sided" and "one-sided": the eps with the least error and bias, over the slopes
    good: dict[
        str, tuple[float, float]
    ]  # from which eps to which steps make at least 98% of the progress of the best one
    loss: float  # at theta
    slope: float  # RMS over the probes of the first derivative along them
    curvature: float  # of the second
    third: float  # of the third
    reference: tuple[float, float]  # the two eps from which the slopes were extrapolated to eps 0
    probes: int
    evaluations: int

    def at(self, eps: float) -> Rung:
        """The rung that is nearest to an eps."""
        return min(self.rungs, key=lambda rung: abs(math.log(rung.eps / eps)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as for JSON."""
        plain = [
            {**rung._asdict(), "two_sided": rung.two_sided._asdict(), "one_sided": rung.one_sided._asdict()}
            for rung in self.rungs
        ]
        return {**asdict(self), "rungs": plain}

    def __str__(self) -> str:
        """A table."""
        lines = ["     eps  rounding | two-sided      bias  corr. below | one-sided      bias  corr. below"]
        for rung in self.rungs:
            kinds = [f" {d.rms:9.2g} {d.bias:9.2g} {d.correlation:6.3f} {d.below:5.0%} " for d in rung[2:]]
            lines.append(f"{rung.eps:8.2g} {rung.error:9.2g} |" + "|".join(kinds))
        for kind, eps in self.recommended.items():
            lines.append("{}: best eps {:.2g}, good from {:.2g} to {:.2g}".format(kind, eps, *self.good[kind]))
        return "\n".join(lines)


def measure(
    optimizer: ZOOptimizer,
    closure: Closure,
    *,
    eps: Sequence[float] = LADDER,
    probes: int = 8,
    progress: Callable[[int, int], object] = lambda done, of: None,
) -> Measurement:
    """Measure how well differences of losses tell the slopes along probes, by eps.

    The loss is evaluated at theta, theta + c z and theta - c z for each c of the ladder and each probe z. Along a probe a
    smooth loss is l(c) = l0 + g c + h c^2 / 2 + t c^3 / 6 + ..., so that (l(c) - l(-c)) / (2 c) is a polynomial in c^2, which is
    extrapolated to c = 0 from two neighbouring c, as Richardson did. Which two: those that agree best with their neighbours
    (Ridders, 1982), as below them rounding makes slopes differ and above them higher orders do. What the differences at smaller
    c are beside g and t is then the forward's rounding: all of it, that of perturbed weights to 16 bits included, as
    nothing else in them does not follow the polynomial. At larger c, where it is hidden by higher orders, it is taken to be
    what it was at the three c below.

    That assumes a loss which is smooth over a decade somewhere on the ladder, whose rounding is about the same wherever it is
    evaluated there and unrelated at different c. It does not assume a dtype, a model or that rounding is normal. A closure that is
    no function of the weights alone, as it draws a batch in each call, counts as one that rounds; a warning says so.

    Weights, the optimizer's state, torch's generators and buffers are as they were afterwards, to the bit: probes are the last of
    the 2^32 streams, which no step draws. With ``engine="inplace"`` a copy of the weights is kept meanwhile. The probes are
    those of the method: of its distribution, its Hessian, and without the layers that its next step leaves out. Processes that share a step
    measure together, and all must call this. The time is that of ``len(eps) * (2 * probes + 1)`` evaluations.

    Args:
        optimizer: whose weights, probes and engine are used.
        closure: returns the loss of one batch, as for ``step``.
        eps: the ladder, at least 4 different numbers.
        probes: how many; an RMS is known to within a fraction of about 1 / sqrt(2 probes).
        progress: called with the number of rungs that are done, and how many there are.

    Raises:
        TypeError, ValueError: an argument out of its range, a loss that is not finite at theta or from the fourth eps on, or one that is
            the same at all points.
        Exception: whatever the closure raises.
    """
    ladder = _check(optimizer, closure, eps, probes)
    found, evaluations = [], 0
    with optimizer.trial(closure) as losses:
        device = losses.evaluation.device
        drawn = list((torch.arange(probes, device=device) + (1 << 32) - probes).split(1))
        for done, c in enumerate(ladder):
            points = [(0.0, None), *((sign * c, probe) for sign in (1, -1) for probe in drawn)]
            found.append(losses([points])[0].double().cpu())
            evaluations += len(points)
            progress(done + 1, len(ladder))
            if not found[-1].isfinite().all():  # nor will they be farther away
                break
    values = torch.stack(found)
    finite = int(values.isfinite().all(1).sum())
    if finite < _FEWEST:
        where = "at theta" if not values[0, 0].isfinite() else f"at eps {ladder[finite]:g}"
        raise ValueError(
            f"closure: expected finite losses at the first {_FEWEST} eps at least, got {float(values[finite].sum())} {where}: "
            "give smaller eps, or look at the loss"
        )
    return _analyse(ladder[:finite], values[:finite], probes, evaluations)


def _check(optimizer: object, closure: object, eps: Sequence[float], probes: object) -> list[float]:
    """The ladder, in order. TypeError, ValueError for an argument out of its range."""
    if not isinstance(optimizer, ZOOptimizer):
        raise TypeError(f"optimizer: expected one of zo_core, got {type(optimizer).__name__}")
    if not callable(closure):
        raise TypeError(f"closure: expected one function that returns the loss, got {type(closure).__name__}")
    if not isinstance(probes, Integral) or not 1 <= probes <= 1 << 20:
        raise ValueError(f"probes: expected an integer from 1 to {1 << 20}, got {probes!r}")
    wrong = [c for c in eps if not isinstance(c, Real) or not 1e-30 <= c <= 1e30]
    if wrong or len(set(eps)) < _FEWEST:
        raise ValueError(
            f"eps: expected at least {_FEWEST} different numbers from 1e-30 to 1e30, got {wrong[0] if wrong else list(eps)!r}"
        )
    return sorted(set(map(float, eps)))


class _Limit(NamedTuple):
    """A polynomial a + b c^2 for each of P probes, through its values at rungs ``first`` and ``first`` + 1."""

    first: int
    a: Tensor  # (P,)
    b: Tensor  # (P,)
    apart: float  # RMS of the difference to what neighbouring rungs give for a


def _limit(values: Tensor, squares: Tensor) -> _Limit | None:
    """Extrapolate values (R, P) at c^2 (R, 1) to c = 0, from where that is the surest; None if they are all zero."""
    slopes = (values[1:] - values[:-1]) / (squares[1:] - squares[:-1])
    limits = values[:-1] - slopes * squares[:-1]
    still = ~values.bool().any(1)  # a step too small to change anything: such rungs agree, but about nothing
    apart = _rms(limits[1:] - limits[:-1])
    apart[still[:-2] | still[1:-1] | still[2:]] = math.inf
    worst = [max(float(x) for x in apart[max(0, j - 1) : j + 1]) for j in range(len(limits))]
    j = min(range(len(worst)), key=worst.__getitem__)
    return _Limit(j, limits[j], slopes[j], worst[j]) if worst[j] < math.inf else None


def _rms(x: Tensor) -> Tensor:
    """Root of the mean square over the last dimension."""
    return x.square().mean(-1).sqrt()


def _analyse(ladder: Sequence[float], values: Tensor, probes: int, evaluations: int) -> Measurement:
    """Losses (R, 1 + 2 P), of which the first is at theta and the last P are on the other side, as a measurement."""
    eps = torch.tensor(ladder, dtype=torch.float64).unsqueeze(1)
    clean, plus, minus = values[:, :1], values[:, 1 : 1 + probes], values[:, 1 + probes :]
    odd, even = plus - minus, plus + minus - 2 * clean
    first = _limit(odd / (2 * eps), eps.square())
    if first is None:
        raise ValueError(
            f"closure: expected losses that depend on the weights, got {float(values[0, 0])} at all points of some eps: the loss does not "
            "read the trained tensors, or is too coarse for eps of this size: give larger ones"
        )
    # Rounding: what differences are beside the polynomial, where that is known from larger eps.
    slope, third, j = first.a, 6 * first.b, first.first
    smooth = 2 * slope * eps + third * eps**3 / 3
    error = _rms(odd - smooth)
    pool = error[max(0, j - _POOLED) : j]
    error[j:] = pool.square().mean().sqrt() if j else eps[0, 0] * first.apart  # all is well: no more than this
    unrepeatable = float(clean.std())
    if unrepeatable > 0.25 * float(error[j]):
        warn(
            f"closure: its losses at one and the same point differ by {unrepeatable:.2g} (standard deviation), so that it is no "
            "function of the weights alone (does it take a new batch in each call?), or the device's sums are not "
            "reproducible. What is measured as rounding contains that"
        )
    second = _limit(even / eps.square(), eps.square())
    curvature, k = (second.a, second.first) if second is not None else (torch.zeros_like(slope), len(ladder))
    # Where extrapolation has ended, higher orders are seen as they are.
    far, bend = (torch.arange(len(ladder)) > n + 1 for n in (j, k))
    third_order = torch.where(far, _rms(odd - 2 * slope * eps), _rms(third * eps**3 / 3))
    second_order = torch.where(bend, _rms(even) / 2, _rms(curvature * eps**2 / 2))
    both = torch.cat((plus - clean, minus - clean), 1), torch.cat((slope, -slope))
    kinds = {
        "two_sided": (odd, slope, 2 * _rms(slope) * eps[:, 0], third_order),
        "one_sided": (*both, _rms(slope) * eps[:, 0], torch.hypot(second_order, third_order / 2)),
    }
    found: dict[str, list[Differences]] = {}
    recommended, good = {}, {}
    for kind, (differences, slopes, signal, bias) in kinds.items():
        size = _rms(differences)
        agree = (differences * slopes).mean(1) / (size * _rms(slopes)).clamp_min(1e-300)
        agree[j:] *= signal[j:] / torch.hypot(signal[j:], error[j:])  # slopes were made of these, with their rounding
        below = (differences.abs() < error.unsqueeze(1)).double().mean(1)
        found[kind] = [Differences(*row) for row in torch.stack((size, bias, agree, below), 1).tolist()]
        progress = signal.square() / (signal.square() + error.square() + bias.square())
        best, name = int(progress.argmax()), kind.replace("_", "-")
        poor = [i for i, share in enumerate(progress.tolist()) if share < _GOOD * float(progress[best])]
        first_good = max((i + 1 for i in poor if i < best), default=0)
        last_good = min((i - 1 for i in poor if i > best), default=len(ladder) - 1)
        recommended[name], good[name] = ladder[best], (ladder[first_good], ladder[last_good])
    rungs = tuple(map(Rung, ladder, error.tolist(), found["two_sided"], found["one_sided"]))
    return Measurement(
        rungs, recommended, good, float(clean[0]), float(_rms(slope)), float(_rms(curvature)), float(_rms(third)),
        (ladder[j], ladder[j + 1]), probes, evaluations,
    )  # fmt: skip
