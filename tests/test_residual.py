"""Residuals in an optimizer: 16-bit weights that train as float32 ones do, through saving, loading and outside writes."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from zo_core.kernels import reference

import zo_core

ENGINES = pytest.mark.parametrize("engine", ["shadow", "inplace"])
BITS = pytest.mark.parametrize("bits", [8, 16])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
X = torch.linspace(-1, 1, 32 * 6).view(32, 6).sin()


def network(dtype=torch.bfloat16):
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 33), nn.Tanh(), nn.Linear(33, 1)).to(dtype)


def loss_of(model):
    return lambda: (model(X.to(model[0].weight.dtype)).float() - X[:, :1]).square().mean()


def optimizer(model, **options):
    return zo_core.MeZO(model, **{"lr": 1e-2, "eps": 1e-2, "seed": 5, "distribution": "rademacher", **options})


def values(opt):
    pairs = zip(opt._tensors(), opt._own["residuals"], strict=True)
    return [reference.join(p.detach(), r) for p, r in pairs]


def prescribed(opt, plus, minus):
    """A step with these losses, whatever the weights, so that all runs have the same gradients."""
    compares = opt.engine == "shadow" and opt.updates == 0
    left = iter([plus, plus, minus] if compares else [plus, minus])
    opt.step(lambda: next(left))


@ENGINES
@pytest.mark.parametrize("lr", [1e-7, 1e-5])
def test_16_bits_in_bfloat16_are_float32(engine, lr):
    model, twin = network(), network().float()
    losses = torch.rand(2, 300, generator=torch.Generator().manual_seed(1)).tolist()
    opt, exact = optimizer(model, lr=lr, residual=16, engine=engine), optimizer(twin, lr=lr, engine=engine)
    for a, b in zip(*losses, strict=True):
        prescribed(opt, a, b)
        prescribed(exact, a, b)
    for p, value, q in zip(model.parameters(), values(opt), twin.parameters(), strict=True):
        assert torch.equal(value, q)
        assert torch.all((p.float() - q).abs() <= (q.to(torch.bfloat16).float() - q).abs())  # the value, rounded


@BITS
@DTYPES
def test_small_updates_arrive(dtype, bits):
    """Displacement after 200 updates, each far below half an ulp, against exact sums."""
    model = network(dtype)
    opt, before = optimizer(model, lr=1e-6, residual=bits), [p.detach().double() for p in model.parameters()]
    steps = torch.zeros(200)
    for k in range(200):
        steps[k] = g = 10.0 + k % 7
        prescribed(opt, g * 1e-2, -g * 1e-2)
    for i, (value, start) in enumerate(zip(values(opt), before, strict=True)):
        element = torch.arange(start.numel())
        exact = sum(
            -1e-6 * float(g) * reference.rademacher(element, tensor_id=i, stream=k, seed=5) for k, g in enumerate(steps)
        ).view(start.shape)
        error = (value.double() - start - exact).norm() / exact.norm()
        assert error < {8: 0.3, 16: 1e-2}[bits]


@BITS
@ENGINES
def test_a_saved_run_continues_bit_for_bit(bits, engine):
    def run(steps, model, opt):
        for _ in range(steps):
            opt.step(loss_of(model))

    whole, first = network(), network()
    opt = optimizer(whole, residual=bits, engine=engine)
    run(9, whole, opt)
    part = optimizer(first, residual=bits, engine=engine)
    run(4, first, part)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": part.state_dict()}, file)
    for order in (("model", "optimizer"), ("optimizer", "model")):
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        second = network().requires_grad_()
        with torch.no_grad():
            second[0].weight.zero_()
        again = optimizer(second, residual=bits, seed=77, engine=engine)
        for name in order:
            (second if name == "model" else again).load_state_dict(saved[name])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(5, second, again)
        for p, q, r, s in zip(whole.parameters(), second.parameters(), values(opt), values(again), strict=True):
            assert torch.equal(p, q) and torch.equal(r, s)


@ENGINES
def test_an_outside_write_resets_the_residuals_of_what_was_written(engine):
    model = network()
    opt = optimizer(model, residual=16, engine=engine)
    for _ in range(3):
        opt.step(loss_of(model))
    residuals = opt._own["residuals"]
    assert all(r.any() for r in residuals)
    kept = residuals[0].clone()
    with torch.no_grad():
        model[2].weight.add_(1)
    model[2].bias.data = model[2].bias.data.clone()
    opt.param_groups[0]["lr"] = 0.0
    with pytest.warns(UserWarning, match=r"^2\.weight, 2\.bias: written since the last step"):
        opt.step(loss_of(model))
    close = torch.equal(residuals[0], kept) if engine == "shadow" else residuals[0].any()
    assert close and not (engine == "shadow" and (residuals[2].any() or residuals[3].any()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(loss_of(model))
        with pytest.raises(KeyError):
            opt.step(lambda: {}["no"])
        opt.step(loss_of(model))


def test_residuals_of_other_weights_than_were_saved_are_reset():
    model = network()
    opt = optimizer(model, residual=8)
    for _ in range(3):
        opt.step(loss_of(model))
    state, other = copy.deepcopy(opt.state_dict()), network()
    again = optimizer(other, residual=8)
    again.load_state_dict(state)
    with pytest.warns(UserWarning, match="written since the last step"):
        again.step(loss_of(other))


@BITS
def test_memory_is_what_was_asked_for(bits):
    model = network()
    model[2].float()
    count = sum(p.numel() for p in model[0].parameters())
    assert optimizer(model, residual=bits).memory()["residuals"] == count * bits // 8
    assert optimizer(model, residual=None).memory()["residuals"] == 0


def test_a_group_that_comes_later_gets_residuals():
    model = network()
    opt = optimizer([{"params": list(model[0].parameters())}], residual=8, module=model)
    opt.step(loss_of(model))
    opt.add_param_group({"params": list(model[2].parameters())})
    opt.step(loss_of(model))
    assert [r.shape for r in opt._own["residuals"]] == [p.shape for p in model.parameters()]


def test_saturated_weights_are_reported_by_name():
    model = network(torch.float16)
    with torch.no_grad():
        model[2].weight.fill_(65504)
    opt = optimizer(model, lr=1.0, eps=64.0, residual=None)
    prescribed(opt, 6400.0, 0.0)
    assert list(opt.saturated) == ["2.weight"] and 0 < opt.saturated["2.weight"] < 33
    assert model[2].weight.isfinite().all()


def test_the_number_of_bits_is_checked():
    with pytest.raises(ValueError, match="residual: expected None, 8 or 16"):
        optimizer(network(), residual=4)


@pytest.mark.parametrize("change", [lambda p: p.neg_(), lambda p: p.copy_(p.flip(0)), lambda p: p.add_(1)])
def test_a_state_saved_after_an_outside_write_resets_as_well(change):
    model = network()
    opt = optimizer(model, residual=16)
    for _ in range(3):
        opt.step(loss_of(model))
    saved = copy.deepcopy(opt.state_dict())
    other = network()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        change(model[0].weight)
        change(other[0].weight)
    residuals = [r.clone() for r in opt._own["residuals"]]
    later = opt.state_dict()
    assert all(map(torch.equal, opt._own["residuals"], residuals))  # asking changes nothing
    for state in (saved, later):
        again = optimizer(copy.deepcopy(other), residual=16)
        again.load_state_dict(state)
        with pytest.warns(UserWarning, match=r"^0\.weight: written"):
            again._prepare()
        assert not again._own["residuals"][0].any() and torch.equal(again._own["residuals"][1], residuals[1])


def test_a_model_that_changes_its_dtype_gets_or_loses_residuals():
    model = network().float()
    opt = optimizer(model, residual=8)
    for dtype, expected in ((torch.float32, False), (torch.bfloat16, True), (torch.float32, False)):
        model.to(dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(written since|less than the spacing)")
            opt.step(loss_of(model))
        assert (opt.memory()["residuals"] > 0) == expected
