"""What ``measure`` finds on losses whose slopes, curvature and rounding are known, and that it changes nothing."""

import math

import pytest
import torch
from torch import nn
from toys import loss_of

import zo_core
from zo_core import floor

D = 64
A = 1 + torch.arange(D, dtype=torch.float64).cos()
H = 2 + torch.arange(D, dtype=torch.float64).sin()


class Weights(nn.Module):
    """Float32 weights, zero so that theta + c z is as exact as c z."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(D))


def polynomial(model, grid=0.0, cubic=0.0):
    """3 + a.w + w.H w / 2 + cubic sum w^3 / 6 in float64, rounded to multiples of a number if one is given."""

    def closure():
        w = model.w.double()
        loss = 3 + A @ w + H @ w.square() / 2 + cubic / 6 * w.pow(3).sum()
        return (loss / grid).round() * grid if grid else loss

    return closure


def slopes_of(n, first=None):
    """The derivatives at zero along n probes of signs, by default those that are measured."""
    first = (1 << 32) - n if first is None else first
    streams = range(first, first + n)
    return torch.stack([A @ zo_core.noise.sample("rademacher", D, seed=0, stream=s).double() for s in streams])


@pytest.mark.parametrize("grid", [1e-3, 3e-5])
def test_rounding_slopes_and_biases_are_found_where_they_are_known(grid):
    model, n = Weights(), 24
    opt = zo_core.MeZO(model, lr=1e-3, distribution="rademacher")
    found = zo_core.measure(opt, polynomial(model, grid, cubic=30.0), probes=n)
    slopes = slopes_of(n)
    # Along signs: g = A.z, h = sum H for every probe, t = 30 sum z^3, of RMS 30 sqrt(D).
    assert found.slope == pytest.approx(float(slopes.square().mean().sqrt()), rel=0.02)
    assert found.curvature == pytest.approx(float(H.sum()), rel=0.05)
    assert found.third == pytest.approx(30 * D**0.5, rel=0.4)
    error = grid / 6**0.5  # two independent errors, uniform over the grid
    for rung in found.rungs:
        two, one, c = rung.two_sided, rung.one_sided, rung.eps
        if grid < found.slope * c:  # where a difference is many steps of the grid
            assert rung.error == pytest.approx(error, rel=0.5)  # 24 probes: 15% is a standard deviation
            assert two.rms == pytest.approx(2 * c * found.slope, rel=0.1, abs=2 * two.bias)
            assert one.bias == pytest.approx(c**2 * float(H.sum()) / 2, rel=0.1)
        if 2 * found.slope * c < grid / 4:  # no difference is half a step of the grid
            assert (two.rms, two.correlation, two.below) == (0, 0, 1)
        ratio = math.hypot(error, 10 * D**0.5 * c**3) / (2 * c * found.slope)
        if grid < found.slope * c:
            assert two.correlation == pytest.approx(1 / math.hypot(1, ratio), abs=0.02)
    costs = {
        "two-sided": lambda c: math.hypot(error, 10 * D**0.5 * c**3) / (2 * c),
        "one-sided": lambda c: math.hypot(error, H.sum() * c**2 / 2) / c,
    }
    for kind, cost in costs.items():  # within a rung of the best, as the errors that were found have scatter
        best = min((rung.eps for rung in found.rungs), key=cost)
        assert 0.3 < found.recommended[kind] / best < 3.3, kind


@pytest.mark.parametrize("grid", [1e-3, 1e-5])
def test_the_rounding_at_one_eps_takes_few_evaluations(grid):
    model, calls = Weights(), []
    loss = polynomial(model, grid, cubic=30.0)
    opt = zo_core.FZOO(model, lr=1e-3, eps=1e-3, engine="shadow")
    error = floor.error_at_eps(opt, lambda: (calls.append(0), loss())[1])
    assert len(calls) == 20 + 1 and 0.4 < error / (grid / 6**0.5) < 2.5  # and the check of the shadow engine


def test_a_loss_without_rounding_has_an_error_of_nothing():
    model = Weights()
    found = zo_core.measure(zo_core.MeZO(model, lr=1e-3, distribution="rademacher"), polynomial(model), probes=4)
    assert max(rung.error for rung in found.rungs) < 1e-8 * found.slope  # products of float32 weights are nearly exact
    assert min(rung.two_sided.correlation for rung in found.rungs) > 1 - 1e-9


def test_bfloat16_forwards_are_held_against_float32_ones():
    """The error that is found without float32 is the one that float32 shows."""
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        model = nn.Sequential(
            nn.Embedding(50, 64), *(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)), nn.Linear(64, 50)
        )
    tokens = torch.arange(400) % 50

    def loss(autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(tokens)
        return nn.functional.cross_entropy(logits.float(), (tokens * 7) % 50)

    opt, n = zo_core.MeZO(model, lr=1e-3, distribution="rademacher"), 12
    found = zo_core.measure(opt, lambda: loss(True), probes=n, eps=[10 ** (k / 2) for k in range(-8, -1)])
    probes = list((torch.arange(n) + (1 << 32) - n).split(1))
    seen = []
    for rung in found.rungs:
        points = [(sign * rung.eps, probe) for sign in (1, -1) for probe in probes]
        plus, minus = {}, {}
        for autocast in (True, False):
            with opt.trial(lambda autocast=autocast: loss(autocast)) as losses:
                plus[autocast], minus[autocast] = losses([points])[0].double().view(2, n)
        rough, exact = (plus[x] - minus[x] for x in (True, False))
        error = float((rough - exact).square().mean().sqrt())
        agree = float((rough * exact).sum() / (rough.norm() * exact.norm()))
        seen.append((rung.eps, rung.error, error, rung.two_sided.correlation, agree))
        if rung.eps < 0.02:
            assert rung.error == pytest.approx(error, rel=0.3), seen
            assert rung.two_sided.correlation == pytest.approx(agree, abs=0.03), seen
    assert min(agree for *_, agree in seen) < 0.8 < 0.99 < max(agree for *_, agree in seen)  # both ends were there


class Noisy(nn.Module):
    """Dropout and batch norm: generators and buffers move in every forward."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 1))

    def forward(self, x):
        return self.layers(x)


def make(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(3)
        return Noisy().to(dtype)


def bits(model, opt):
    """All that measuring must not change."""
    tensors = [*model.parameters(), *model.buffers(), *opt._own["residuals"]]
    return (
        [t.detach().clone() for t in tensors],
        str(opt.state_dict()),
        torch.get_rng_state(),
        opt.flat,
        opt.below_floor,
    )


@pytest.mark.parametrize("engine", ["shadow", "grouped", "inplace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_measuring_changes_nothing(engine, dtype):
    ladder = [0.01, 0.03, 0.1, 0.3]
    model, other = make(dtype), make(dtype)
    if engine == "grouped":
        model.layers[1], other.layers[1] = nn.LayerNorm(16).to(dtype), nn.LayerNorm(16).to(dtype)
    opts = [zo_core.FZOO(m, lr=1e-2, eps=0.05, rho=0.0, engine=engine) for m in (model, other)]
    with torch.random.fork_rng():
        zo_core.measure(opts[0], loss_of(model), eps=ladder, probes=3)  # before the first step
        for _ in range(2):
            opts[0].step(loss_of(model))
        before = bits(model, opts[0])
        progress = []
        zo_core.measure(opts[0], loss_of(model), eps=ladder, probes=3, progress=lambda *done: progress.append(done))
        after = bits(model, opts[0])
        assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
        assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
        assert torch.equal(before[2], after[2]) and before[1] == after[1] and before[3:] == after[3:]
        opts[0].step(loss_of(model))
        state = torch.get_rng_state()
    with torch.random.fork_rng():
        for _ in range(3):
            opts[1].step(loss_of(other))
        assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("engine", ["shadow", "inplace"])
def test_an_exception_while_measuring_changes_nothing(engine):
    model = make()
    opt, loss, calls = zo_core.MeZO(model, lr=1e-2, engine=engine), loss_of(model), []

    def fails():
        calls.append(0)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return loss()

    opt.step(loss)
    before = bits(model, opt)
    with pytest.raises(KeyboardInterrupt):
        zo_core.measure(opt, fails)
    after = bits(model, opt)
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True)) and before[1] == after[1]
    opt.step(loss)


def test_mistakes_are_named():
    model = Weights()
    opt, loss = zo_core.MeZO(model, lr=1e-3), polynomial(model)
    for error, message, call in (
        (TypeError, "optimizer: expected one of zo_core, got SGD", lambda: zo_core.measure(torch.optim.SGD(model.parameters()), loss)),
        (TypeError, "closure: expected one function", lambda: zo_core.measure(opt, [loss])),
        (ValueError, "probes: expected an integer", lambda: zo_core.measure(opt, loss, probes=0)),
        (ValueError, "eps: expected at least 4 different numbers", lambda: zo_core.measure(opt, loss, eps=[1e-3] * 9)),
        (ValueError, r"eps: .* got -1.0", lambda: zo_core.measure(opt, loss, eps=[1e-3, 1e-2, 1e-1, -1.0])),
        (ValueError, "depend on the weights, got 0.5 at all points", lambda: zo_core.measure(opt, lambda: 0.5)),
        (ValueError, "finite losses .* got nan at theta", lambda: zo_core.measure(opt, lambda: math.nan)),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()


def test_losses_that_are_not_finite_far_away_end_the_ladder():
    model = Weights()
    loss = polynomial(model)
    found = zo_core.measure(
        zo_core.MeZO(model, lr=1e-3), lambda: loss() if float(model.w.detach().abs().max()) < 0.05 else math.inf
    )
    assert [rung.eps < 0.05 for rung in found.rungs].count(True) == len(found.rungs) >= 4
    assert found.evaluations == 17 * (len(found.rungs) + 1)


def test_a_closure_that_is_no_function_of_the_weights_is_warned_of():
    model, batches = Weights(), iter(range(1000))
    loss = polynomial(model)
    with pytest.warns(UserWarning, match="at one and the same point differ by"):
        zo_core.measure(zo_core.MeZO(model, lr=1e-3), lambda: loss() + 0.01 * math.sin(next(batches) ** 2))


@pytest.mark.parametrize("method", [zo_core.MeZO, zo_core.FZOO, zo_core.SPSA])
@pytest.mark.parametrize("spread", [False, True])
def test_probes_whose_difference_is_below_the_floor_are_counted(method, spread):
    model, slopes = Weights(), slopes_of(4, first=0).abs().sort().values
    opt = method(model, lr=1e-6, eps=1e-3, probes=4, distribution="rademacher")
    sides = 1 if opt.one_sided else 2
    opt.noise_floor = sides * 1e-3 * float(slopes[1:3].mean())  # two of the four are below
    loss = polynomial(model)
    opt.step([loss] * 4 if spread else loss)
    assert opt.below_floor == (2, 4)
    opt.noise_floor = 0.0
    opt.step([loss] * 4 if spread else loss)
    assert opt.below_floor == (2, 8)
    opt.noise_floor = None  # not known: nothing is counted
    opt.step([loss] * 4 if spread else loss)
    assert opt.below_floor == (2, 8)
