"""Every optimizer takes the steps of its textbook twin: one runner over methods, dtypes, engines, backends and options.

Twins (twins.py) compute in float64 and round into the parameters, so that a float32 optimizer may be off by what float32
loses in a few steps, and a 16-bit one by its rounding of the probes.
"""

import math

import pytest
import torch
from torch import nn
from toys import loss_of
from twins import TwinAdaMeZO, TwinBSZO, TwinFZOO, TwinHiZOO, TwinMEAZO, TwinMeZO, TwinSPSA
from zo_core.bindings import ops

import zo_core
from zo_core import layers

SEED = (1 << 63) + 5
METHODS = {  # name: optimizer, twin, the options of both, those of the optimizer alone, those of the twin alone
    "mezo": (zo_core.MeZO, TwinMeZO, {"lr": 2e-2}, {}, {}),
    "mezo, 2 probes": (zo_core.MeZO, TwinMeZO, {"lr": 2e-2, "probes": 2}, {}, {}),
    "hizoo": (zo_core.HiZOO, TwinHiZOO, {"lr": 2e-2, "smoothing": 1e-2}, {}, {}),
    "hizoo, 3 probes": (zo_core.HiZOO, TwinHiZOO, {"lr": 2e-2, "smoothing": 3e-3, "probes": 3}, {}, {}),
    "hizoo-l": (
        zo_core.HiZOO, TwinHiZOO, {"lr": 2e-2, "smoothing": 1e-2, "probes": 2}, {"hessian": "factored"}, {"factored": True},
    ),
    "fzoo": (zo_core.FZOO, TwinFZOO, {"lr": 2e-2, "probes": 5}, {}, {}),
    "fzoo-r": (zo_core.FZOO, TwinFZOO, {"lr": 2e-2, "probes": 3, "reuse": True}, {}, {}),
    "fzoo, mean deviation": (zo_core.FZOO, TwinFZOO, {"lr": 2e-2, "probes": 3, "beta": 0.6}, {}, {}),
    "adamezo": (
        zo_core.AdaMeZO, TwinAdaMeZO, {"lr": 1e-2, "probes": 2, "momentum": 0.8, "beta2": 0.5, "window": 3}, {}, {},
    ),
    "meazo": (zo_core.MEAZO, TwinMEAZO, {"lr": 2e-2, "probes": 2, "beta": 0.6, "zeta": 0.02}, {}, {}),
    "bszo": (
        zo_core.BSZO, TwinBSZO, {"lr": 5e-3, "probes": 3, "prior": 2.0, "noise": 8.0, "alpha": 0.9, "repeats": 2}, {}, {},
    ),
    "spsa": (zo_core.SPSA, TwinSPSA, {"lr": 3e-2, "probes": 4, "alpha": 0.3, "floor": 0.5}, {}, {}),
}  # fmt: skip


class Blocks(nn.Module):
    """Four residual blocks between two layers that always train."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 17)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(17), nn.Linear(17, 17), nn.Tanh()) for _ in range(4))
        self.last = nn.Linear(17, 1)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


def network(dtype=torch.float32) -> Blocks:
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        return Blocks().to(dtype)


def frozen(model):
    model.first.weight.requires_grad_(False)
    model.blocks[1].requires_grad_(False)


def tied(model):
    model.blocks[3][1].weight = model.blocks[0][1].weight


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def take_steps(
    name, dtype=torch.float32, steps=4, change=lambda model: None, groups=False, later=False, spread=False, **options
):
    """Hold an optimizer against its twin for some steps under a schedule.

    ``change``: made in the model first. ``groups``: two groups, of vectors and of matrices, with rates of their own.
    ``later``: the last layer is added after two steps. ``spread``: each probe has a part of the batch of its own. Other
    options are the optimizer's.
    """
    method, twin, both, own, twins_own = METHODS[name]
    model, other, start = network(dtype), network(dtype), network(dtype)
    for m in (model, other, start):
        change(m)
    params, mine, theirs = model, trained(model), trained(other)
    if groups:
        first, second = ([i for i, p in enumerate(mine) if (p.ndim > 1) == matrix] for matrix in (False, True))
        params = [
            {"params": [mine[i] for i in first], "weight_decay": 0.5},
            {"params": [mine[i] for i in second], "lr": torch.tensor(1e-2)},
        ]
        mine, theirs = ([tensors[i] for i in (*first, *second)] for tensors in (mine, theirs))
    if later:
        params = mine[:-2]
        options["module"] = model
    eps = 1e-2 if dtype == torch.float32 else 0.125
    exact = {"residual": 16, "stochastic_rounding": False}
    opt = method(params, seed=SEED, eps=eps, **exact, **both, **own, **({"module": model} if groups else {}), **options)
    reference = twin(theirs[:-2] if later else theirs, SEED, opt._own["distribution"])
    reference.decay_vectors = groups or later
    reference.momentum, reference.window = options.get("momentum", 0.0), options.get("window", 1)
    reference.scales = options.get("scales")
    sets = layers.tensors_of(list(model.blocks), mine, model) if "rho" in options else ()
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))
    for step in range(steps):
        if later and step == 2:
            opt.add_param_group({"params": mine[-2:], "lr": 1e-3})
            reference.add(theirs[-2:])
        reference.left_out = layers.left_out(sets, options.get("rho", 0), seed=SEED, step=step)
        before = [p.clone() for p in mine]
        scale = 1 if later else 1 / (1 + step)
        lr, weight_decay = both["lr"] * scale, options.get("weight_decay", 0.0)
        if groups:
            lr = [lr if p.ndim == 1 else 1e-2 * scale for p in mine]
            weight_decay = [0.5 * (p.ndim == 1) for p in mine]
        if later and step >= 2:
            lr = [lr] * len(mine[:-2]) + [1e-3] * 2
        at = {**both, **twins_own, "lr": lr, "eps": eps, "weight_decay": weight_decay}
        parts = opt.probes
        batch, same = ([loss_of(m, k, parts) for k in range(parts)] if spread else loss_of(m) for m in (model, other))
        loss, expected = opt.step(batch), reference.step(same, **at)
        if not later:
            schedule.step()
        assert float(loss) == pytest.approx(expected, rel=1e-4 if dtype == torch.float32 else 2e-2)
        for i, (p, value) in enumerate(zip(mine, reference.values, strict=False)):
            near = {"atol": 5e-5 * (step + 1), "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 1e-2}
            assert torch.allclose(p.double(), value, **near), (step, i)
            assert i not in reference.left_out or torch.equal(p, before[i])  # not even written and put back
    for h, expected in zip(opt._own["hessians"], reference.hessians, strict=False):
        full = h[0].unsqueeze(1) * h[1] / h[0].mean() if len(h) > 1 else h[0]
        assert torch.allclose(full.double(), expected, rtol=2e-3 if dtype == torch.float32 else 0.2)
    for p, q in zip(model.parameters(), start.parameters(), strict=True):
        assert p.requires_grad or torch.equal(p, q)
    assert max(float((p - q).detach().abs().max()) for p, q in zip(trained(model), trained(start), strict=True)) > 1e-2


ALL = pytest.mark.parametrize("name", METHODS)
DTYPES, ENGINES = (torch.float32, torch.bfloat16, torch.float16), ("shadow", "inplace")
# each method with each dtype and with each engine, each dtype with each engine
EVERY_DTYPE = [(name, dtype, ENGINES[(i + j) % 2]) for i, name in enumerate(METHODS) for j, dtype in enumerate(DTYPES)]


@pytest.mark.parametrize(("name", "dtype", "engine"), EVERY_DTYPE, ids=str)
def test_steps_are_the_twin_s_in_every_dtype(name, dtype, engine):
    take_steps(name, dtype, steps=8 if dtype == torch.float32 else 4, engine=engine)


@pytest.mark.parametrize("name", ["mezo, 2 probes", "hizoo", "hizoo-l", "fzoo"])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_steps_are_the_twin_s_on_every_backend_with_either_distribution(backend, monkeypatch, name, distribution):
    monkeypatch.setattr(ops, "backend_for", lambda device: backend)
    take_steps(name, distribution=distribution, weight_decay=0.3)


@pytest.mark.parametrize(("name", "engine"), [(name, ENGINES[i % 2]) for i, name in enumerate(METHODS)])
def test_steps_are_the_twin_s_with_weight_decay(name, engine):
    take_steps(name, engine=engine, weight_decay=0.3)


@pytest.mark.parametrize(("name", "engine"), [(name, ENGINES[(i + 1) % 2]) for i, name in enumerate(METHODS)])
def test_steps_are_the_twin_s_with_half_of_the_blocks_left_out(name, engine):
    take_steps(name, engine=engine, rho=0.5, weight_decay=0.1)


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("mezo, 2 probes", "shadow"),
        ("hizoo", "inplace"),
        ("hizoo-l", "shadow"),
        ("fzoo-r", "grouped"),
        ("spsa", "inplace"),
    ],
)
def test_steps_are_the_twin_s_with_momentum_and_blocks_left_out(name, engine):
    take_steps(name, steps=6, engine=engine, rho=0.5, weight_decay=0.1, momentum=0.8, window=3)


def test_momentum_does_not_move_a_tensor_along_probes_from_before_it_was_added():
    take_steps("mezo", later=True, momentum=0.8, window=4)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "factored"])
def test_adamezo_of_published_defaults_is_the_twin(distribution):
    model, other = network(), network()
    opt = zo_core.AdaMeZO(model, lr=1e-2, seed=SEED, distribution=distribution)
    twin = TwinAdaMeZO(trained(other), SEED, distribution)
    for _ in range(12):  # more steps than the window has
        opt.step(loss_of(model))
        twin.step(loss_of(other), 1e-2, 1e-3)
    for p, value in zip(trained(model), twin.values, strict=True):
        assert torch.allclose(p.double(), value, atol=2e-3)


@ALL
def test_steps_are_the_twin_s_in_groups_with_rates_of_their_own(name):
    take_steps(name, groups=True)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "fzoo-r"])
def test_steps_are_the_twin_s_after_a_group_was_added(name):
    take_steps(name, later=True)


@ALL
def test_frozen_tensors_have_no_number_and_do_not_move(name):
    take_steps(name, change=frozen)


@ALL
def test_tied_tensors_count_once(name):
    take_steps(name, change=tied)


@ALL
@pytest.mark.parametrize("engine", ["shadow", "inplace", "grouped"])
def test_steps_are_the_twin_s_with_a_batch_of_its_own_for_each_probe(name, engine):
    take_steps(name, spread=True, engine=engine)


@pytest.mark.parametrize("name", ["mezo, 2 probes", "fzoo"])  # with blocks left out, the first is LeZO
def test_steps_are_the_twin_s_with_a_batch_for_each_probe_and_blocks_left_out(name):
    take_steps(name, spread=True, rho=0.5, weight_decay=0.3, distribution="rademacher")


@pytest.mark.parametrize(("name", "engine"), [(name, (*ENGINES, "grouped")[i % 3]) for i, name in enumerate(METHODS)])
def test_steps_are_the_twin_s_with_a_scale_for_each_tensor(name, engine):
    scales = [0.3 + 0.35 * (i * 7 % 5) for i in range(len(list(network().parameters())))]
    take_steps(name, engine=engine, scales=scales, rho=0.25, weight_decay=0.3)


@pytest.mark.parametrize("rho", [0.25, 0.5, 0.75])
def test_lezo_is_mezo_with_blocks_left_out(rho):
    one, other = network(), network()
    lezo, mezo = zo_core.LeZO(one, lr=1e-2, rho=rho, seed=3), zo_core.MeZO(other, lr=1e-2, rho=rho, seed=3)
    for _ in range(4):
        assert float(lezo.step(loss_of(one))) == float(mezo.step(loss_of(other)))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert math.isclose(zo_core.LeZO(network(), lr=1e-2).rho, 0.75)
