"""Scales of probes by kind of tensor, from slopes and curvatures that a few dozen evaluations of the loss show."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .optim.points import Closure
from .scales import kind_of, resolve
from .weights import Point

if TYPE_CHECKING:
    from .optim.base import ZOOptimizer

STREAMS = (1 << 32) - (1 << 20)  # the first of the streams that calibrations use, and no step
LARGEST = 2.0  # a scale before all are normalized is from 1 / LARGEST to LARGEST
_STREAMS = 2  # at least
_EPS = 3.0  # probes of a calibration are so many times those of a step: a curvature needs longer ones than a slope
_LONGEST = 5.0  # and those of a kind alone at most so many times that
_PRIOR = 2.0  # how many streams the scatter of all kinds counts as, beside that of a kind
_ROUNDS, _QUANTILES, _TINY = 20, 64, 1e-300


class Kind(NamedTuple):
    """What was measured of the tensors of one kind. Errors are standard deviations."""

    name: str
    tensors: int
    weights: int
    slope2: float  # |g|^2, without the rounding of losses; below 0 where that is all there is
    slope2_error: float
    curvature: float  # trace of the Hessian
    curvature_error: float
    scale: float


class Calibration(dict[str, float]):
    """Scales by tensor name, to be given as ``scales=`` or to be saved (``zo_core.scales.save``).

    Attributes:
        kinds: what was measured.
        noise: standard deviation of a loss's rounding, third-order terms included.
        gain: how many times the progress of a step without scales the estimates promise at the best rates of both. As the scales
            were chosen by the same estimates, it is too large.
        rate: how many times the best ``lr`` of a two-sided method is by the estimates that without scales.
        evaluations: how many were made.
    """

    def __init__(
        self, scales: Mapping[str, float], kinds: Sequence[Kind], noise: float, gain: float, rate: float, evaluations: int
    ) -> None:  # fmt: skip
        super().__init__(scales)
        self.kinds, self.noise, self.gain, self.rate, self.evaluations = list(kinds), noise, gain, rate, evaluations


@torch.no_grad()
def calibrate(
    optimizer: "ZOOptimizer", closure: Closure | Sequence[Closure], evaluations: int = 48, *,
    eps: float | None = None, apply: bool = True,
) -> Calibration:  # fmt: skip
    """Measure slope and curvature by kind of tensor with forwards alone, and choose a scale for each kind from them.

    **What is maximised.** Let the tensors of kind t have scale sigma_t, gradient g_t and Hessian block H_tt, and S be the diagonal
    matrix of all scales. A step of one two-sided probe z with E[z z^T] = 1 is -lr (g^T S z) S z. To second order the loss changes by

        -lr G + lr^2 / 2 (G C + 2 g^T S (S H S) S g),   G = sum_t sigma_t^2 |g_t|^2,   C = sum_t sigma_t^2 tr(H_tt)

    (z Gaussian; with signs the last term is another one of its size). It is neglected, though it is not always small:
    on SmolLM2 a third of G C where G is the gradient's of all data, a tenth where it is a batch's. Then the best rate is lr = 1 / C, and a step gains G / (2 C): scales are to maximise
    G / C. (n probes a step have C / n in place of C, and methods that normalise the step, as FZOO, are at lr = 1 / C where theirs is
    best: neither changes the best scales.) In s_t = sigma_t^2 both sums are linear, so the best s_t are at the ends of their range:
    the upper one if |g_t|^2 > (G / C) tr(H_tt), and else the lower one, where G / C is that of the best s itself (Dinkelbach).

    **What is chosen.** Whether that inequality holds is uncertain. Let q_t be the mean square of m slopes along probes of kind t, which
    are about normal with variance |g_t|^2 + v_t, v_t the part of rounding in it. Given the data, with all orders of magnitude alike
    likely before, (|g_t|^2 + v_t) / q_t is distributed as m / chi^2_m, and the trace as h ~ N(its estimate, its error^2). So the
    inequality holds with the probability

        p_t = E_h P(chi^2_m < m q_t / (max(G / C h, 0) + v_t))

    and the mean of the log of the best scale is (2 p_t - 1) log(LARGEST). With w_t = 1 - v_t / q_t, the share of the slopes that is no
    rounding (0 where that is all there is),

        sigma_t = LARGEST^(w_t (2 p_t - 1)):   between 1/2 and 2, and 1 where nothing is known

    before all of them are multiplied so that sum_t d_t sigma_t^2 = d.

    **What is measured.** For each of m streams z_j and each kind, with e_t = eps sqrt(d / d_t) (at most 5 eps), so that a probe of few
    weights is as long as one of all of them, but for that limit: the losses at theta +- e_t z_j, z_j = 0 in the tensors of other
    kinds. Their difference over 2 e_t is the slope g_t^T z_j, whose square has the mean |g_t|^2; their sum, less twice the loss at theta, over
    e_t^2 is the curvature z_j^T H_tt z_j, which has the mean tr(H_tt). The slope along z_j of all tensors together is the sum of those of
    the kinds. What it differs by is the rounding of losses (and their terms of third order, which count as such): of that comes the
    variance v of a loss's rounding, and v / (2 e_t^2) is subtracted from the mean square of the slopes. That takes 2 (kinds + 1) + 1 evaluations a stream.

    **What is assumed** beside the neglected term: that slopes are about normal (sums over many weights), that the rounding of
    losses is alike at all these points, and that one step's progress is worth maximising. Slopes are those of the closure's
    batch: where its gradient is mostly noise, so are they, and scales are right if kinds have about the same share of noise.

    Weights, their residuals, torch's generators, buffers, and the state of the optimizer are afterwards what they were, bit for bit,
    also after an error. (The in-place engine needs a copy of the weights for that, for as long as this takes.) The streams are
    a range of their own, from 2^32 - 2^20 on, which a step would reach after 4 billion probes. With several processes all of
    them must call it.

    Args:
        optimizer: whose engine, eps, probes' distribution and processes are used; scales that it has are not.
        closure: as in ``step``; of a list, one is taken after the other, for a stream each.
        evaluations: how many to make at most (the shadow engine's first one takes another call of the closure). At least two streams are needed, so where there are more than
            ``evaluations // 4 - 2`` kinds, those with the fewest weights but norms and biases count as one.
        eps: size of the perturbations; None: three times that of the optimizer, as a curvature is a small difference of losses
            that are rounded.
        apply: whether the optimizer gets the scales.

    Returns:
        The scales by tensor name, with what was measured.

    Raises:
        ValueError: too few evaluations, or a loss that is not finite.
        Exception: whatever the closure raises.
    """
    closures = [closure] if callable(closure) else list(closure) if isinstance(closure, list | tuple) else []
    if not closures or not all(map(callable, closures)):
        raise TypeError(f"closure: expected a function that returns the loss, or a list of them, got {closure!r}")
    least = _STREAMS * (2 * 2 + 3)
    if type(evaluations) is not int or evaluations < least:
        raise ValueError(
            f"evaluations: expected an integer of at least {least}, for two kinds and two streams, got {evaluations!r}"
        )
    names, sizes = optimizer._names(), [p.numel() for p in optimizer._parameters()]
    kinds = _kinds(names, sizes, (evaluations // _STREAMS - 3) // 2)
    if len(kinds) < 2:
        return Calibration(dict.fromkeys(names, 1.0), [], 0.0, 1.0, 1.0, 0)
    before = optimizer.scales
    if "scales" in optimizer._own:
        optimizer.scales = None  # type: ignore[assignment]
    try:
        probes = _measure(optimizer, closures, kinds, evaluations // (2 * len(kinds) + 3), eps or _EPS * optimizer.eps)
    finally:
        if optimizer.scales != before:
            optimizer._set_scales(before, normalize=False)
    found = _choose(kinds, probes, names, sizes)
    if apply:
        optimizer._set_scales(found, normalize=False)
    return found


class _Probes(NamedTuple):
    """What was measured along m streams, float64 on the CPU; sizes of perturbations are of the kinds, then of all tensors."""

    eps: Tensor  # (kinds + 1,)
    slopes: Tensor  # (m, kinds + 1)
    curvatures: Tensor  # (m, kinds + 1)


def _kinds(names: Sequence[str], sizes: Sequence[int], most: int) -> dict[str, list[int]]:
    """The numbers of the tensors of each kind; the kinds of fewest weights are one, "other", where there are more than ``most``."""
    kinds: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        if sizes[i]:
            kinds.setdefault(kind_of(name), []).append(i)
    rest = sorted((k for k in kinds if k not in ("norm", "bias")), key=lambda k: sum(sizes[i] for i in kinds[k]))
    few = rest[: len(kinds) - most + 1] if len(kinds) > most else []
    other = sorted(i for k in few for i in kinds.pop(k))
    return kinds | ({"other": other} if other else {})


def _measure(
    optimizer: "ZOOptimizer", closures: Sequence[Closure], kinds: Mapping[str, Sequence[int]], streams: int, length: float
) -> _Probes:  # fmt: skip
    """Slopes and curvatures along parts of ``streams`` probes."""
    parameters = optimizer._parameters()
    moving = {i for i, p in enumerate(parameters) if p.requires_grad}
    parts = [moving.intersection(which) for which in kinds.values()] + [moving]
    weights = [sum(parameters[i].numel() for i in part) for part in parts]
    eps = [length * min(_LONGEST, math.sqrt(weights[-1] / max(n, 1))) for n in weights]
    losses: list[list[Tensor]] = []
    with optimizer.trial(closures[0]) as at:
        for j in range(streams):
            at.closures, probe = [closures[j % len(closures)]], torch.tensor([STREAMS + j], device=at.evaluation.device)
            for part, size in zip(parts, eps, strict=True):
                points: list[Point] = [(size, probe), (-size, probe)]
                points += [(0.0, None)] if part is parts[-1] else []
                at.left_out = set(range(len(parameters))) - part
                nothing = [torch.zeros((), dtype=torch.float64, device="cpu")] * 2
                losses.append([*at([points])[0].double().cpu()] if part else nothing)
    table = torch.stack([torch.stack(pair[:2]) for pair in losses]).view(streams, len(parts), 2)
    clean = torch.stack([group[2] for group in losses[len(kinds) :: len(parts)]]).view(streams, 1)
    if not (table.isfinite().all() and clean.isfinite().all()):
        raise ValueError("closure: expected finite losses around the weights, got some that are not: use a smaller eps")
    lengths, (plus, minus) = torch.tensor(eps, dtype=torch.float64, device="cpu"), table.unbind(2)
    return _Probes(lengths, (plus - minus) / (2 * lengths), (plus + minus - 2 * clean) / lengths**2)


def _choose(
    kinds: Mapping[str, Sequence[int]], probes: _Probes, names: Sequence[str], sizes: Sequence[int]
) -> Calibration:
    """The scales that follow from these slopes and curvatures; see ``calibrate``."""
    m, eps, slopes, curvatures = len(probes.slopes), probes.eps[:-1], probes.slopes[:, :-1], probes.curvatures[:, :-1]
    apart = probes.slopes[:, -1] - slopes.sum(1)  # rounding: each slope has a variance of v / (2 eps^2)
    v = float(apart.square().mean() / (0.5 / probes.eps.square()).sum())
    squares = slopes.square().mean(0)
    noise = v / (2 * eps.square())
    slope2 = squares - noise
    # The square of a normal variable of variance a has the variance 2 a^2, and (mean square)^2 the mean (1 + 2 / m) a^2.
    slope2_variance = 2 * squares.square() / (m + 2)
    curvature = curvatures.mean(0)
    scatter = curvatures.var(0) * eps**4  # in units of losses, in which the rounding of all kinds is alike
    scatter = ((m - 1) * scatter + _PRIOR * scatter.mean()) / (m - 1 + _PRIOR)
    curvature_variance = (scatter / m + 4 * v) / eps**4  # 4 v: the loss at theta may be the same for all streams
    known = (1 - noise / squares.clamp_min(_TINY)).clamp_min(0.0)
    at = torch.special.ndtri((torch.arange(_QUANTILES, dtype=torch.float64, device="cpu") + 0.5) / _QUANTILES)
    traces = curvature + curvature_variance.sqrt() * at.unsqueeze(1)  # quantiles of their distributions
    best = one = torch.ones_like(slope2)
    for _ in range(_ROUNDS):
        if (best.square() @ slope2) <= 0 or (best.square() @ curvature) <= 0:  # too coarse to say anything
            best = one
            break
        progress = (best.square() @ slope2) / (best.square() @ curvature)
        least = (progress * traces).clamp_min(0.0) + noise
        p = torch.special.gammainc(
            torch.tensor(m / 2, dtype=torch.float64, device="cpu"), m * squares / 2 / least.clamp_min(_TINY)
        ).mean(0)
        best = LARGEST ** (known * (2 * p - 1))
    chosen = dict(zip(kinds, best.tolist(), strict=True))
    of = {i: chosen[kind] for kind, which in kinds.items() for i in which}
    scales = resolve([of.get(i, 1.0) for i in range(len(names))], names, sizes) or (1.0,) * len(names)
    now = torch.tensor([scales[which[0]] for which in kinds.values()], dtype=torch.float64, device="cpu")
    ratio = [float((x.square() @ slope2) / (x.square() @ curvature)) for x in (now, one)]
    columns = (slope2, slope2_variance.sqrt(), curvature, curvature_variance.sqrt(), now)
    rows = zip(kinds.items(), torch.stack(columns, 1).tolist(), strict=True)
    found = [Kind(kind, len(which), sum(sizes[i] for i in which), *row) for (kind, which), row in rows]
    said = bool((best != one).any())
    rate = float(curvature.sum() / (now.square() @ curvature)) if said else 1.0
    gain = ratio[0] / ratio[1] if said else 1.0
    return Calibration(dict(zip(names, scales, strict=True)), found, math.sqrt(v), gain, rate, m * (2 * len(kinds) + 3))
