"""What a user's training loop relies on, with MeZO as the example."""

import copy
import io
import math
import os
import pickle
import signal
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toys import loss_of, same

import zo_core
from zo_core.engines.base import uninterrupted


def network(seed: int = 0, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(seed)
        layers = nn.Sequential(nn.Linear(6, 33), nn.LayerNorm(33), nn.Tanh(), nn.Dropout(dropout), nn.Linear(33, 1))
        return layers.to(dtype)


ENGINES = pytest.mark.parametrize("engine", ["shadow", "inplace"])


def test_it_trains():
    model = network()
    opt = zo_core.MeZO(model, lr=2e-2, probes=4)
    first = float(opt.step(loss_of(model)))
    for _ in range(400):
        last = float(opt.step(loss_of(model)))
    assert last < first / 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_trains_16_bit_weights(dtype):
    model = network(dtype=dtype)
    opt = zo_core.MeZO(model, lr=1e-2, eps=3e-2, probes=4)
    first = float(opt.step(loss_of(model)))
    for _ in range(400):
        last = float(opt.step(loss_of(model)))
    assert last < first / 2


def test_frozen_parameters_have_no_name_among_the_trained_ones():
    model = network()
    model[0].weight.requires_grad_(False)
    assert zo_core.MeZO(model, lr=1e-2).param_groups[0]["param_names"][0] == "0.bias"


def test_tensors_in_no_group_are_not_touched():
    model = network()
    opt = zo_core.MeZO([{"params": list(model[0].parameters())}, {"params": list(model[4].parameters())}], lr=1e-2)
    opt.step(loss_of(model))
    assert torch.equal(model[1].weight, network()[1].weight) and not torch.equal(model[4].weight, network()[4].weight)


def test_closures_may_return_numbers():
    model, other = network(), network()
    a, b = (zo_core.MeZO(m, lr=1e-2) for m in (model, other))
    for _ in range(3):
        a.step(loss_of(model))
        loss = b.step(lambda: loss_of(other)().item())  # a metric, say: nothing is differentiated
        assert loss.dtype == torch.float64
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [(None, TypeError, "NoneType"), (torch.zeros(2), ValueError, r"shape \(2,\)"), ("1", TypeError, "str")],
)
def test_a_closure_that_returns_no_scalar_is_refused(result, error, message):
    model = network()
    with pytest.raises(error, match=f"closure: expected.*{message}"):
        zo_core.MeZO(model, lr=1e-2).step(lambda: result)
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(model.parameters(), network().parameters(), strict=True))


def test_gradients_are_not_made_or_touched():
    model = network()
    loss_of(model)().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    enabled = set()
    opt = zo_core.MeZO(model, lr=1e-2)
    opt.step(lambda: (enabled.add(torch.is_grad_enabled()), loss_of(model)())[1])
    assert enabled == {False}
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))


def test_dropout_is_the_same_in_the_evaluations_of_a_step_and_differs_between_steps():
    model = network(dropout=0.5).train()
    masks = []
    hook = model[3].register_forward_hook(lambda m, a, out: masks.append(out == 0))
    opt = zo_core.MeZO(model, lr=0.0, probes=2)
    opt.step(loss_of(model))  # the first calls the closure once more
    masks.clear()
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(1)
        for _ in range(2):
            opt.step(loss_of(model))
    hook.remove()
    first, second = masks[:4], masks[4:]
    assert all(torch.equal(m, first[0]) for m in first)
    assert all(torch.equal(m, second[0]) for m in second)
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 1, 2, 3])
@ENGINES
def test_a_non_finite_loss_skips_the_step_and_is_counted(bad, at, engine):
    model = network()
    opt = zo_core.MeZO(model, lr=0.0, probes=2, weight_decay=0.1, engine=engine)
    opt.step(loss_of(model))  # the first may call the closure once more
    opt.param_groups[0]["lr"] = 1e-2
    calls = []
    opt.step(lambda: (calls.append(0), bad if len(calls) - 1 == at else loss_of(model)())[1])
    assert (opt.skipped, opt.updates) == (1, 1)
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(model.parameters(), network().parameters(), strict=True))
    opt.step(loss_of(model))
    assert (opt.skipped, opt.updates) == (1, 2)


def test_a_step_too_large_for_float32_is_skipped():
    model = network()
    opt = zo_core.MeZO(model, lr=1e30)
    calls = []
    opt.step(lambda: (calls.append(0), 1e30 * len(calls))[1])
    assert opt.skipped == 1
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(model.parameters(), network().parameters(), strict=True))


@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@ENGINES
def test_an_exception_in_the_closure_leaves_weights_and_state_as_they_were(error, at, engine):
    model, untouched = network(dropout=0.3), network(dropout=0.3)
    opt, other = (zo_core.MeZO(m, lr=1e-2, probes=2, engine=engine) for m in (model, untouched))
    calls = []

    def closure():
        calls.append(0)
        value = loss_of(model)()
        if len(calls) == at:
            raise error("in the middle of a step")
        return value

    rng = torch.get_rng_state()
    with pytest.raises(error):
        opt.step(closure)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(model.parameters(), untouched.parameters(), strict=True))
    expected = float(other.step(loss_of(untouched)))
    torch.set_rng_state(rng)
    assert float(opt.step(loss_of(model))) == pytest.approx(expected, rel=1e-5)  # the same probes as without it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["deepcopy", "torch.save", "pickle"])
def test_a_saved_run_continues_bit_for_bit(dtype, way):
    def run(steps, model, opt, schedule):
        for _ in range(steps):
            opt.step(loss_of(model))
            schedule.step()

    def fresh(seed, lr):
        model = network(dtype=dtype)
        opt = zo_core.MeZO(model, lr=lr, eps=1e-2, probes=2, seed=seed, distribution="rademacher")
        return model, opt, torch.optim.lr_scheduler.CosineAnnealingLR(opt, 20)

    whole = fresh(7, 1e-2)
    run(9, *whole)
    first = fresh(7, 1e-2)
    run(4, *first)
    saved = tuple(x.state_dict() for x in first)
    if way == "deepcopy":
        saved = copy.deepcopy(saved)
    else:
        file = io.BytesIO(pickle.dumps(saved))
        if way == "torch.save":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        else:
            saved = pickle.load(file)
    run(5, *first)  # what was saved does not change with it
    second = fresh(8, 1.0)
    for thing, state in zip(second, saved, strict=True):
        thing.load_state_dict(state)
    run(5, *second)
    assert same(second[0], whole[0]) and same(first[0], whole[0])
    assert second[1].seed == 7 and second[1].updates == 9


def test_foreign_state_is_refused():
    model = network()
    opt = zo_core.MeZO(model, lr=1e-2)
    with pytest.raises(ValueError, match="state_dict: expected"):
        opt.load_state_dict(torch.optim.SGD(model.parameters(), lr=1.0).state_dict())


def test_an_optimizer_can_be_copied_and_pickled():
    model = network()
    opt = zo_core.MeZO(model, lr=1e-2)
    opt.step(loss_of(model))
    pair = copy.deepcopy((model, opt))
    assert float(pair[1].step(loss_of(pair[0]))) == float(opt.step(loss_of(model)))
    pickle.loads(pickle.dumps(opt))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr: expected"),
        ({"lr": math.nan}, "lr: expected"),
        ({"eps": 0.0}, "eps: expected"),
        ({"weight_decay": -0.1}, "weight_decay: expected"),
        ({"probes": 0}, "probes: expected"),
        ({"probes": 1.5}, "probes: expected"),
        ({"seed": -1}, "seed: expected"),
        ({"distribution": "cauchy"}, "distribution: expected"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        zo_core.MeZO(network(), **{"lr": 1e-2, **options})


def test_bad_parameters_are_refused():
    model = network()
    with pytest.raises(TypeError, match="float64"):
        zo_core.MeZO(model.double(), lr=1e-2)
    with pytest.raises(ValueError, match="contiguous"):
        zo_core.MeZO([nn.Parameter(torch.zeros(4, 6)[:, ::2])], lr=1e-2)
    with pytest.raises(ValueError, match="requires_grad"):
        zo_core.MeZO(network().requires_grad_(False), lr=1e-2)
    with pytest.raises(ValueError, match="overlap"):
        whole = torch.zeros(10)
        zo_core.MeZO([nn.Parameter(whole[:6]), nn.Parameter(whole[5:])], lr=1e-2)
    with pytest.raises(ValueError, match="eps: expected 0.001 as in the first group"):
        parts = [{"params": [nn.Parameter(torch.zeros(3))], "eps": e} for e in (1e-3, 1e-2)]
        zo_core.MeZO(parts, lr=1e-2)
    with pytest.raises(TypeError, match="closure"):
        zo_core.MeZO(network(), lr=1e-2).step(None)


def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was():
    model = network()
    opt = zo_core.MeZO(model[0], lr=1e-2)
    with pytest.raises(TypeError):
        opt.add_param_group({"params": [("w", nn.Parameter(torch.zeros(3).double()))]})
    assert len(opt.param_groups) == 1
    opt.step(loss_of(model))


def test_eps_below_the_weights_spacing_warns_once_by_name():
    model = network(dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match=r"eps=1e-05 .*0\.weight"):
        opt = zo_core.MeZO(model, lr=1e-2, eps=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(loss_of(model))
        zo_core.MeZO(network(), lr=1e-2, eps=1e-5)  # float32 has room


@given(seed=st.integers(0, (1 << 64) - 1))
def test_every_seed_is_its_own_run(seed):
    model, other = network(), network()
    zo_core.MeZO(model, lr=1e-2, seed=seed).step(loss_of(model))
    zo_core.MeZO(other, lr=1e-2, seed=seed ^ 1).step(loss_of(other))
    assert not torch.allclose(model[0].weight, other[0].weight, atol=1e-6)


def test_no_global_generator_is_used():
    model = network()
    state = torch.get_rng_state()
    zo_core.MeZO(model, lr=1e-2).step(loss_of(model))
    assert torch.equal(torch.get_rng_state(), state)


def test_average_projected_gradient_is_the_gradient():
    """E[g z] is the gradient (SPSA is unbiased to first order): 5,000 probes on a quadratic, five sigma."""
    d, n = 8, 5_000
    w = nn.Parameter(torch.zeros(d))
    target = torch.linspace(-1, 1, d)
    opt = zo_core.MeZO([w], lr=1.0, probes=n, eps=1e-2, distribution="rademacher")
    opt.step(lambda: 0.5 * (w - target).square().sum())
    gradient = -target  # and the step is minus its estimate
    sigma = math.sqrt(float(gradient.square().sum()) / n)
    assert float((-w.detach() - gradient).abs().amax()) < 5 * sigma


def test_a_decay_too_large_for_float32_is_skipped():
    model = network()
    opt = zo_core.MeZO(model, lr=1e30, weight_decay=1e30)
    opt.step(lambda: 1.0)
    assert opt.skipped == 1
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(model.parameters(), network().parameters(), strict=True))


def test_optimizers_that_load_one_state_do_not_share_it():
    model, other = network(), network()
    saved = zo_core.MeZO(model, lr=1e-2).state_dict()
    a, b = zo_core.MeZO(model, lr=1e-2), zo_core.MeZO(other, lr=1e-2)
    a.load_state_dict(saved)
    b.load_state_dict(saved)
    a.step(loss_of(model))
    assert (a.updates, b.updates) == (1, 0)


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGALRM])
def test_a_step_that_a_signal_interrupts_happens_wholly_or_not_at_all(at, number):
    """A handler that raises right after pass number `at`: two perturb, the third restores and updates."""

    class Stop(BaseException):
        pass

    def stop(*_):
        raise Stop

    model, other, untouched = network(), network(), network()
    opt, reference = (zo_core.MeZO(m, lr=1e-2, engine="inplace") for m in (model, other))
    reference.step(loss_of(other))
    space = opt._prepare().space
    original, calls = space.update_, []

    def interrupted(*args, **kwargs):
        original(*args, **kwargs)
        calls.append(0)
        if len(calls) == at:
            os.kill(os.getpid(), number)

    space.update_ = interrupted
    previous = signal.signal(number, stop)
    try:
        with pytest.raises(Stop):
            opt.step(loss_of(model))
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, previous)
    assert opt.updates == (1 if at == 3 else 0)
    expected = other if at == 3 else untouched
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(model.parameters(), expected.parameters(), strict=True))
    assert int(opt._own["stream"]) == opt.updates  # the next step draws the probe that comes next


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_torch_s_default_dtype_changes_nothing(dtype):
    model, other = network(), network()
    a, b = (zo_core.MeZO(m, lr=1e-2, weight_decay=0.1) for m in (model, other))
    expected = a.step(loss_of(model))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        loss = b.step(loss_of(other))
        assert torch.equal(zo_core.noise.sample("gaussian", 3, seed=0), zo_core.noise.sample("gaussian", 3, seed=0))
        fresh = zo_core.MeZO(network().float(), lr=1e-2)
        fresh.step(lambda: 1.0)
    finally:
        torch.set_default_dtype(before)
    assert same(model, other) and float(loss) == float(expected)


def test_skipped_steps_of_16_bit_weights_round_anew_each_time():
    model = network(dtype=torch.bfloat16)
    before = model[0].weight.detach().float().clone()
    opt = zo_core.MeZO(model, lr=1e-2, eps=1e-2)
    for _ in range(200):
        opt.step(lambda: math.nan)
    drift = (model[0].weight.float() - before).square().mean().sqrt() / before.square().mean().sqrt()
    assert opt.skipped == 200 and drift.item() < 0.15  # a random walk; with the same bits every time it is over 0.5


def test_a_step_inside_its_own_closure_is_refused():
    model = network()
    opt = zo_core.MeZO(model, lr=1e-2)
    with pytest.raises(RuntimeError, match="inside its own closure"):
        opt.step(lambda: opt.step(loss_of(model)))
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(model.parameters(), network().parameters(), strict=True))
    opt.step(loss_of(model))


def test_an_optimizer_made_in_inference_mode_steps_outside():
    model = network()
    with torch.inference_mode():
        opt = zo_core.MeZO(model, lr=1e-2)
        opt.load_state_dict(opt.state_dict())
    opt.step(loss_of(model))
    assert opt.updates == 1


def test_groups_added_to_a_module_s_optimizer_decay_as_they_say():
    model, extra = network(), nn.Parameter(torch.ones(5))
    opt = zo_core.MeZO(model, lr=0.1, weight_decay=0.0)
    opt.add_param_group({"params": [("extra", extra)], "weight_decay": 0.5})
    opt.step(lambda: 1.0)
    assert torch.allclose(extra.detach(), torch.full((5,), 0.95))


def test_handlers_are_put_back_and_all_signals_delivered_whatever_a_handler_raises():
    def raises(number, frame):
        if armed:
            got.append(number)
            raise KeyboardInterrupt

    armed, got, numbers = [True], [], (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)
    before = [signal.signal(number, raises) for number in numbers]
    try:
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            for number in numbers:
                os.kill(os.getpid(), number)
        assert sorted(got) == sorted(numbers)
        for _ in range(300):
            try:
                armed[:] = [True]
                signal.setitimer(signal.ITIMER_REAL, 2e-5)  # goes off once, anywhere in here
                for _ in range(20):
                    with uninterrupted():
                        pass
                armed.clear()
            except KeyboardInterrupt:
                pass
            assert all(signal.getsignal(number) is raises for number in numbers)
    finally:
        armed.clear()
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
