"""What all methods share in any combination, and what their estimates tend to; test_twins.py has their steps."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_twins import METHODS, network
from torch import nn
from toys import X, Y, loss_of

import zo_core
from zo_core import layers

ENGINES = pytest.mark.parametrize("engine", ["shadow", "inplace"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def pair(name, model, other, seed=5, **more):
    """An optimizer, and its twin with the options that both take."""
    method, twin, options, own, extra = METHODS[name]
    opt = method(model, seed=seed, **options, **own, **more)
    twin = twin(other.parameters(), seed, opt._own["distribution"])
    return opt, twin, {**options, **extra}


def close(model, other, tolerance):
    return all(
        torch.allclose(p.double(), v, atol=tolerance, rtol=1e-2 if p.dtype != torch.float32 else 1e-5)
        for p, v in zip(model.parameters(), other, strict=True)
    )


def test_hessian_scaling_with_curvature_weights_and_many_probes():
    model = network()
    opt = zo_core.SPSA(model, lr=1e-2, probes=4, hessian="diagonal", distribution="gaussian", smoothing=1e-3)
    other = network()
    hizoo = zo_core.HiZOO(other, lr=1e-2, probes=4, smoothing=1e-3)
    opt.param_groups[0]["alpha"] = 0.0  # weights of 1: the same method
    for _ in range(3):
        assert float(opt.step(loss_of(model))) == float(hizoo.step(loss_of(other)))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_run_continues_bit_for_bit(name, dtype):
    eps = 1e-2 if dtype == torch.float32 else 0.125
    model = network(dtype)
    opt, _, _ = pair(name, model, network(), rho=0.25, eps=eps)
    for _ in range(3):
        opt.step(loss_of(model))
    other = network(dtype)
    other.load_state_dict(model.state_dict())
    resumed, _, _ = pair(name, other, network(), rho=0.25, eps=eps, seed=0)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(3):
        assert float(opt.step(loss_of(model))) == float(resumed.step(loss_of(other)))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    for h, g in zip(opt._own["hessians"], resumed._own["hessians"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(h, g, strict=True))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("at", [1, 2])
@ENGINES
def test_an_exception_or_a_nan_changes_nothing(name, at, engine):
    model, undisturbed = network(), network()
    opt, _, _ = pair(name, model, network(), engine=engine, rho=0.25)
    same, _, _ = pair(name, undisturbed, network(), engine=engine, rho=0.25)
    loss = loss_of(model)

    def fails(result):
        calls = []

        def closure():
            calls.append(0)
            if len(calls) < at:
                return loss()
            if result is None:
                raise KeyboardInterrupt
            return result

        return closure

    exact = 0 if engine == "shadow" else 3e-7
    opt.step(loss)
    same.step(loss_of(undisturbed))
    state = copy.deepcopy(opt.state_dict())
    with pytest.raises(KeyboardInterrupt):
        opt.step(fails(None))
    for key, value in opt.state_dict()["state"][0]["zo"].items():
        assert str(value) == str(state["state"][0]["zo"][key])
    for p, q in zip(model.parameters(), undisturbed.parameters(), strict=True):
        assert torch.allclose(p, q, atol=exact, rtol=0)
    opt.step(fails(torch.tensor(math.nan)))
    for p, q in zip(model.parameters(), undisturbed.parameters(), strict=True):
        assert torch.allclose(p, q, atol=exact, rtol=0)
    assert str(opt._own["hessians"]) == str(same._own["hessians"])
    assert opt.skipped == 1
    opt.step(loss)
    opt.step(loss)
    assert opt.skipped == 1
    assert not torch.equal(model.last.weight, undisturbed.last.weight)


@pytest.mark.parametrize("name", ["fzoo", "fzoo-r"])
def test_equal_losses_skip_a_step(name):
    model = network()
    opt, _, _ = pair(name, model, network(), weight_decay=0.1)
    opt.step(lambda: 0.5)
    assert opt.skipped == 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), network().parameters(), strict=True))


def test_fzoo_r_counts_only_losses_of_steps_that_counted():
    model, other = network(), network()
    opt, twin, options = pair("fzoo-r", model, other, eps=1e-2)
    opt.step(lambda: math.nan)  # before there are any
    twin.stream += 3
    assert opt.carry.isnan().all()
    opt.step(loss_of(model))
    twin.step(loss_of(other), eps=1e-2, **options)
    before = opt.carry.clone()
    opt.step(lambda: math.nan)
    twin.stream += 3
    assert torch.equal(opt.carry, before)
    opt.step(loss_of(model))
    twin.step(loss_of(other), eps=1e-2, **options)
    assert opt.skipped == 2
    assert close(model, twin.values, 1e-4)


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        (zo_core.MeZO, "lr", -1.0), (zo_core.MeZO, "eps", 0.0), (zo_core.MeZO, "probes", 0), (zo_core.MeZO, "probes", 2.0),
        (zo_core.FZOO, "probes", 1), (zo_core.HiZOO, "smoothing", 5.0), (zo_core.SPSA, "floor", 0.0), (zo_core.LeZO, "rho", 1.5),
    ],
)  # fmt: skip
def test_options_set_anew_are_checked_before_a_weight_is_touched(method, name, value):
    model = network()
    opt = method(model, lr=1e-2)
    opt.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"{name}: expected"):
        opt.step(loss_of(model))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), network().parameters(), strict=True))


def test_weights_read_past_their_modules_are_found_though_the_first_step_leaves_them_out():
    model = network()

    def loss():
        x = model.first(X)
        for block in model.blocks:
            x = block[0](x)
            with torch._C.DisableTorchFunctionSubclass():
                weight = block[1].weight + 0
            x = x + torch.tanh(nn.functional.linear(x, weight, block[1].bias))
        return (model.last(x) - Y).square().mean()

    opt = zo_core.MeZO(model, lr=0.0, rho=0.75)
    with pytest.warns(UserWarning, match="read elsewhere"):
        opt.step(loss)
    held = {opt._engine.space.names[i] for i in opt._engine._swapped}
    assert held == {f"blocks.{i}.1.weight" for i in range(4)}


# ---- what estimates tend to -------------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """l = 1/2 theta^T diag(h) theta + b theta: gradient h theta + b, Hessian h."""

    def __init__(self, h, b, start):
        super().__init__()
        self.theta = nn.Parameter(start.clone())
        self.h, self.b = h, b

    def forward(self):
        return (0.5 * self.h * self.theta**2 + self.b * self.theta).sum()


H, B, START = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0]), torch.linspace(-1, 1, 5), torch.linspace(1, -2, 5)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (zo_core.MeZO, {}),
        (zo_core.MeZO, {"distribution": "rademacher"}),
        (zo_core.HiZOO, {"smoothing": 0.0}),
        (zo_core.SPSA, {"alpha": 0.0}),
    ],
)
def test_the_mean_step_is_along_the_gradient(method, options):
    n, lr = 5_000, 1e-3
    model = Quadratic(H, B, START)
    method(model, lr=lr, eps=1e-2, probes=n, **options).step(model)
    step = (START - model.theta.detach()) / lr
    gradient = H * START + B
    error = (step - gradient).norm() / gradient.norm()
    assert error < 5 * math.sqrt(len(H) + 1) / math.sqrt(n)  # five standard deviations


def test_fzoo_steps_along_the_gradient_over_its_length():
    """s is eps |gradient|, as l_i - l_0 = eps gradient u_i: a step of lr gradient / |gradient|."""
    n, lr = 5_000, 1e-3
    model = Quadratic(torch.zeros(5), B, START)
    zo_core.FZOO(model, lr=lr, eps=1e-3, probes=n).step(model)
    step = (START - model.theta.detach()) / lr
    assert torch.allclose(step, B / B.norm(), atol=5 / math.sqrt(n))


def test_the_hessian_takes_the_shape_of_the_true_one():
    model = Quadratic(H, torch.zeros(5), torch.zeros(5))
    opt = zo_core.HiZOO(model, lr=0.0, eps=1e-1, smoothing=2e-3)
    mean = torch.zeros(5)
    for step in range(6_000):
        opt.step(model)
        mean += opt._own["hessians"][0][0] if step >= 2_500 else 0
    shape = mean / mean.sum()
    assert torch.allclose(shape, H / H.sum(), rtol=0.25)


# ---- layers ----------------------------------------------------------------------------------------------------


@given(n=st.integers(2, 60), rho=st.floats(0, 0.999), seed=st.integers(0, 2**64 - 1), step=st.integers(0, 2**33))
def test_so_many_blocks_are_left_out_by_seed_and_step_alone(n, rho, seed, step):
    sets = [{i} for i in range(n)]
    found = layers.left_out(sets, rho, seed=seed, step=step)
    assert len(found) == math.floor(rho * n + 1e-9)
    assert found == layers.left_out(sets, rho, seed=seed, step=step)


def test_all_blocks_are_left_out_equally_often():
    n, steps = 8, 2_000
    sets = [{i} for i in range(n)]
    counts = [0] * n
    for step in range(steps):
        for i in layers.left_out(sets, 0.75, seed=1, step=step):
            counts[i] += 1
    deviation = math.sqrt(steps * 0.75 * 0.25)
    assert all(abs(c - 0.75 * steps) < 5 * deviation for c in counts)


def test_blocks_are_the_largest_list_or_the_named_one():
    model = network()
    assert layers.find_blocks(model) == list(model.blocks)
    assert layers.find_blocks(model, "blocks") == list(model.blocks)
    assert layers.find_blocks(model, [model.first, model.last]) == [model.first, model.last]
    for module, blocks, message in (
        (None, None, "module"),
        (model.first, None, "found none"),
        (model, "layers", "'layers'"),
        (model, "last", "is a Linear"),
        (model, [model.first], "at least two"),
    ):
        with pytest.raises(ValueError, match=message):
            layers.find_blocks(module, blocks)


def test_blocks_in_a_sequence_are_those_of_the_class_that_it_has_most_of():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

    stages = nn.Sequential(nn.Linear(3, 4), nn.TransformerEncoderLayer(4, 1), Block(), Block(), Block(), nn.Flatten())
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(Block(), Block()), stages)
    assert layers.find_blocks(model) == list(stages[2:5])
    with pytest.raises(ValueError, match="found none in Sequential"):  # plain layers are no blocks
        layers.find_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


def test_blocks_that_are_none_are_refused():
    with pytest.raises(TypeError, match="blocks: expected modules"):
        zo_core.MeZO(network(), lr=1e-2, blocks=list(network().parameters()))
    with pytest.raises(ValueError, match="none of the trained tensors"):
        zo_core.MeZO(network(), lr=1e-2, blocks=list(network().blocks))


def test_shared_tensors_are_left_out_only_with_all_their_blocks():
    model = network()
    model.blocks[1][1].weight = model.blocks[0][1].weight
    model.blocks[2][1].bias = model.first.bias
    tensors = list(model.parameters())
    sets = layers.tensors_of(list(model.blocks), tensors, model)
    shared = next(i for i, p in enumerate(tensors) if p is model.blocks[0][1].weight)
    assert shared in sets[0] and shared in sets[1]
    assert all(next(i for i, p in enumerate(tensors) if p is model.first.bias) not in s for s in sets)
    for step in range(30):
        out = layers.left_out(sets, 0.5, seed=0, step=step)
        assert (shared in out) == (sets[0] | sets[1] <= out)


def test_rho_may_be_set_anew_between_steps():
    model = network()
    opt = zo_core.LeZO(model, lr=1e-2)
    assert opt.rho == 0.75
    opt.param_groups[0]["rho"] = 0.0
    opt.step(loss_of(model))
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), network().parameters(), strict=True))


def test_a_state_of_another_method_or_shape_is_refused():
    with pytest.raises(ValueError, match="state_dict: expected method 'FZOO', got one of 'MeZO'"):
        zo_core.FZOO(network(), lr=1e-2).load_state_dict(zo_core.MeZO(network(), lr=1e-2).state_dict())
    small, large = (zo_core.MeZO(nn.Linear(n, 1).bfloat16(), lr=1e-2, eps=0.1) for n in (5, 6))
    with pytest.raises(ValueError, match="state_dict: expected residuals of shapes"):
        small.load_state_dict(large.state_dict())


def test_a_state_dict_is_of_one_moment():
    model = network()
    opt = zo_core.FZOO(model, lr=1e-2)
    opt.step(loss_of(model))
    state = opt.state_dict()["state"][0]["zo"]
    opt.step(loss_of(model))
    assert (state["steps"], int(state["updates"]), int(state["stream"])) == (1, 1, 8)


def test_a_state_of_another_metric_is_refused():
    state = zo_core.HiZOO(network(), lr=1e-2).state_dict()
    with pytest.raises(ValueError, match="state_dict: expected hessian 'factored', got one of 'diagonal'"):
        zo_core.HiZOO(network(), lr=1e-2, hessian="factored").load_state_dict(state)


# ---- options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (zo_core.LeZO, {"rho": 1.0}, "rho: expected"),
        (zo_core.LeZO, {"rho": -0.1}, "rho: expected"),
        (zo_core.LeZO, {"blocks": "nowhere"}, "blocks: expected"),
        (zo_core.HiZOO, {"smoothing": 1.5}, "smoothing: expected"),
        (zo_core.HiZOO, {"hessian": "full"}, "hessian: expected"),
        (zo_core.MeZO, {"hessian": "diagonal"}, "measures no curvature"),
        (zo_core.FZOO, {"hessian": "diagonal"}, "measures no curvature"),
        (zo_core.FZOO, {"probes": 1}, "probes: expected"),
        (zo_core.FZOO, {"reuse": True, "beta": 0.5}, "beta: expected 0 with reuse=True"),
        (zo_core.FZOO, {"beta": 1.0}, "beta: expected"),
        (zo_core.SPSA, {"alpha": -1}, "alpha: expected"),
        (zo_core.SPSA, {"floor": 0.0}, "floor: expected"),
    ],
)
def test_bad_options_are_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        method(network(), lr=1e-2, **options)


def test_options_that_exclude_each_other_are_refused_where_a_state_brings_one_of_them():
    model, other = network(), zo_core.FZOO(network(), lr=1e-2, reuse=True)
    state = other.state_dict()
    del state["param_groups"][0]["beta"]  # as in states from before there was one
    opt, before = zo_core.FZOO(model, lr=1e-2, beta=0.5), [p.clone() for p in model.parameters()]
    opt.load_state_dict(state)
    with pytest.raises(ValueError, match="beta: expected 0 with reuse=True"):
        opt.step(loss_of(model))
    assert all(map(torch.equal, model.parameters(), before)) and opt._steps == 0


def test_memory_counts_hessians():
    model = network()
    weights = sum(p.numel() for p in model.parameters())
    assert zo_core.HiZOO(model, lr=1e-2).memory()["hessians"] == 4 * weights
    assert zo_core.HiZOO(model, lr=1e-2, hessian="factored").memory()["hessians"] < 2 * weights
