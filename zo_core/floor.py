"""How large eps may and must be: what the differences of losses consist of, over a ladder of eps.

Too small an eps, and a difference of two losses is mostly the forward's own rounding; too large, and it is mostly the loss's
curvature. ``measure`` says how much of each there is, for any closure, without a second model of higher precision.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch

from .bindings.warn import warn
from .optim.base import ZOOptimizer
from .optim.points import Closure

LADDER = tuple(10 ** (half / 2) for half in range(-10, -1))  # 1e-5 to 1e-1 in half decades
_FEWEST = 4  # values of eps, for two terms of a polynomial and some noise
_ITERATIONS = 200
_GOOD = 0.98  # of the progress of the best eps, of which a good one has at least as much
_POOLED = 3  # values of eps whose errors stand for those at larger ones


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
    good: dict[str, tuple[float, float]]  # the eps around it at which steps make at least 98% of its progress
    loss: float  # at theta
    slope: float  # RMS over the probes of the first derivative along them
    curvature: float  # of the second
    third: float  # of the third
    smooth_to: float  # the largest eps at which a loss was taken to be a polynomial
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
    smooth loss is l(c) = l0 + g c + h c^2 / 2 + t c^3 / 6 + ..., so that l(c) - l(-c) is 2 g c + t c^3 / 3, and the forward's
    rounding, which does not become smaller with c. Slopes g and third derivatives t are fitted to the differences at all
    c of the ladder up to the one from which on the fit no longer improves, as higher orders enter. What the differences are
    beside them is rounding: all of it, that of perturbed weights to 16 bits included. Where the polynomial follows the rounding
    (at the largest c that it was fitted to) and where it does not hold, rounding is taken to be that at the three c below.

    That assumes a loss which is smooth somewhere on the ladder, and whose rounding there is about the same wherever it is
    evaluated, and unrelated at different c. It does not assume a dtype, a model or an exact loss to compare with. A closure that is
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
        drawn = list(torch.split(torch.arange((1 << 32) - probes, 1 << 32, device=device), 1))
        for done, c in enumerate(ladder):
            points = [(0.0, None), *((sign * c, probe) for sign in (1, -1) for probe in drawn)]
            found.append(losses([points])[0].double().cpu().numpy())
            evaluations += len(points)
            progress(done + 1, len(ladder))
            if not np.isfinite(found[-1]).all():  # nor will they be farther away
                break
    values = np.stack(found)
    finite = int(np.isfinite(values).all(1).sum())
    if finite < _FEWEST:
        where = "at theta" if not np.isfinite(values[0, 0]) else f"at eps {ladder[finite]:g}"
        raise ValueError(
            f"closure: expected finite losses at the first {_FEWEST} eps at least, got {float(values[finite].sum())} {where}: "
            "give smaller eps, or look at the loss"
        )
    return _analyse(ladder[:finite], values[:finite], probes, evaluations)


def error_at_eps(
    optimizer: ZOOptimizer, closure: Closure, progress: Callable[[int, int], object] = lambda done, of: None
) -> float:
    """The forward's rounding in a difference of two losses at the optimizer's eps, to within a third, from 20 evaluations.

    Raises:
        ValueError: the losses there are the same at all points, or not finite.
    """
    eps = float(optimizer.eps)
    ladder = [eps * 10 ** (half / 2) for half in range(-2, 2)]
    found = measure(optimizer, closure, eps=ladder, probes=2, progress=progress)
    return float(_rms(np.array([rung.error for rung in found.rungs[1:3]])))


def _check(optimizer: object, closure: object, eps: Sequence[float], probes: object) -> list[float]:
    """The ladder, in order. TypeError, ValueError for an argument out of its range."""
    if not isinstance(optimizer, ZOOptimizer):
        raise TypeError(f"optimizer: expected one of zo_core, got {type(optimizer).__name__}")
    if not callable(closure):
        raise TypeError(f"closure: expected one function that returns the loss, got {type(closure).__name__}")
    if type(probes) is not int or not 1 <= probes <= 1 << 20:
        raise ValueError(f"probes: expected an integer from 1 to {1 << 20}, got {probes!r}")
    wrong = [c for c in eps if not isinstance(c, Real) or not 1e-30 <= c <= 1e30]
    if wrong or len(set(eps)) < _FEWEST:
        raise ValueError(
            f"eps: expected at least {_FEWEST} different numbers from 1e-30 to 1e30, got {wrong[0] if wrong else list(eps)!r}"
        )
    return sorted(set(map(float, eps)))


class _Fit(NamedTuple):
    """Polynomials a x + b x^3 (or a x^2 + b x^4) through the values at the first rungs, one for each of P probes."""

    rungs: int  # how many it was fitted to
    values: np.ndarray  # (R, P), of the polynomials at all rungs
    first: np.ndarray  # (P,), the first terms at the largest x
    scales: np.ndarray  # (2,), RMS of the two terms at the largest x
    unsure: float  # RMS error of the first terms, over their RMS
    leverage: np.ndarray  # (R,), how much of the noise at each rung is in the polynomial there, from 0 to 1


def _fitted(values: np.ndarray, terms: np.ndarray) -> _Fit:
    """Polynomials through values (R, P), where terms (R, 2), at most 1, has that of a and of b, at as many rungs as follow them.

    At the first ``m`` rungs each value is a polynomial and noise of one variance, and a and b are normal with variances
    of their own: all three are found by maximum likelihood (expectation maximisation), so that b counts as far as it
    is needed and known. At the other rungs values are normal with variances of their own. That ``m`` is taken which
    makes the values most likely: where a polynomial no longer fits, the noise would have to be larger everywhere.
    """
    size = np.abs(values).max() or 1.0
    squares = np.square(values / size).mean(1) + 1e-30
    best, likeliest = None, -math.inf
    n = min(int(np.argmax(np.abs(values).any(1))), len(values) - _FEWEST)  # rungs without any change tell nothing
    for m in range(n + _FEWEST, len(values) + 1):
        y, x = values[n:m] / size, terms[n:m] / terms[m - 1]
        noise, scales = squares[n], np.full(2, squares[m - 1])
        for _ in range(_ITERATIONS):
            covariance = np.linalg.inv(x.T @ x / noise + np.diag(1 / scales))
            mean = covariance @ x.T @ y / noise  # (2, P)
            spread = np.einsum("ri,ij,rj->r", x, covariance, x)
            noise = np.square(y - x @ mean).mean() + spread.mean() + 1e-32
            scales = np.square(mean).mean(1) + covariance.diagonal() + 1e-32
        # -2 log of the likelihood, over P: of normal values with covariance x diag(scales) x^T + noise
        fit = len(y) * np.log(noise) + np.log(scales).sum() - np.linalg.slogdet(covariance)[1]
        fit += (np.square(y - x @ mean) / noise).sum(0).mean() + (np.square(mean).mean(1) / scales).sum()
        likelihood = -fit - (1 + np.log(squares[m:])).sum()
        if likelihood > likeliest:
            leverage = np.pad(np.minimum(1.0, spread / noise), (n, len(values) - m))
            ratio, unsure = size / terms[m - 1], float((covariance[0, 0] / scales[0]) ** 0.5)
            best = _Fit(
                m, terms @ (mean * ratio[:, None]), mean[0] * ratio[0], np.sqrt(scales) * ratio, unsure, leverage
            )
            likeliest = likelihood
    assert best is not None
    return best


def _rms(x: np.ndarray) -> np.ndarray:
    """Root of the mean square over the last dimension."""
    found: np.ndarray = np.sqrt(np.square(x).mean(-1))
    return found


def _analyse(ladder: Sequence[float], values: np.ndarray, probes: int, evaluations: int) -> Measurement:
    """Losses (R, 1 + 2 P), of which the first is at theta and the last P are on the other side, as a measurement."""
    eps, top = np.array(ladder), ladder[-1]
    clean, plus, minus = values[:, :1], values[:, 1 : 1 + probes], values[:, 1 + probes :]
    odd, even = plus - minus, plus + minus - 2 * clean
    if not odd.any():
        raise ValueError(
            f"closure: expected losses that depend on the weights, got {float(values[0, 0])} at all points: the loss does not read the "
            "trained tensors, or is too coarse for eps of this size: give larger ones"
        )
    x = eps / top
    first, second = _fitted(odd, np.stack((x, x**3), 1)), _fitted(even, np.stack((x**2, x**4), 1))
    slope, third = first.scales[0] / (2 * top), 3 * first.scales[1] / top**3
    # Rounding: what differences are beside the polynomials. Where these follow it, it is that of the eps below.
    own = (first.leverage > 0.5) | (np.arange(len(eps)) >= first.rungs)
    error = _rms(odd - first.values) / np.sqrt(np.maximum(1 - first.leverage, 0.5))
    known = np.flatnonzero(~own)
    for i in np.flatnonzero(own):
        below = known[known < i][-_POOLED:]
        error[i] = _rms(error[below]) if len(below) else 2 * eps[i] * slope * first.unsure
    unrepeatable = float(clean.std(ddof=1))
    if unrepeatable > 0.25 * error[-1]:
        warn(
            f"closure: its losses at one and the same point differ by {unrepeatable:.2g} (standard deviation), so that it is no "
            "function of the weights alone (does it take a new batch in each call?), or the device's sums are not "
            "reproducible. What is measured as rounding contains that"
        )
    # Bias: by the polynomials where they were fitted, and farther away as it is seen.
    far, bend = (np.arange(len(eps)) >= fit.rungs for fit in (first, second))
    third_order = np.where(far, _rms(odd - np.outer(x, first.first)), first.scales[1] * x**3)
    second_order = np.where(bend, _rms(even), np.hypot(second.scales[0] * x**2, second.scales[1] * x**4)) / 2
    kinds = {
        "two_sided": (odd, first.first, 2 * slope * eps, third_order),
        "one_sided": (
            np.concatenate((plus - clean, minus - clean), 1), np.concatenate((first.first, -first.first)), slope * eps,
            np.hypot(second_order, third_order / 2),
        ),
    }  # fmt: skip
    found, recommended, good = {}, {}, {}
    for kind, (differences, slopes, signal, bias) in kinds.items():
        size, name = _rms(differences), kind.replace("_", "-")
        seen = (differences * slopes).mean(1) / np.maximum(size * _rms(slopes), 1e-300)
        progress = signal**2 / (signal**2 + error**2 + bias**2)
        correlation = np.where(own & ~far, np.sqrt(progress), seen)  # of what slopes were made of, it would be 1
        below = (np.abs(differences) < error[:, None]).mean(1)
        found[kind] = [Differences(*map(float, row)) for row in zip(size, bias, correlation, below, strict=True)]
        best = int(progress.argmax())
        poor = np.flatnonzero(progress < _GOOD * progress[best])
        first_good, last_good = max(poor[poor < best], default=-1) + 1, min(poor[poor > best], default=len(eps)) - 1
        recommended[name], good[name] = ladder[best], (ladder[first_good], ladder[last_good])
    rungs = tuple(map(Rung, ladder, map(float, error), found["two_sided"], found["one_sided"]))
    return Measurement(
        rungs, recommended, good, float(clean[0, 0]), float(slope), float(second.scales[0] / top**2), float(third),
        ladder[first.rungs - 1], probes, evaluations,
    )  # fmt: skip
