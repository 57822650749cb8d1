"""The shadow engine: its losses are those of the in-place engine."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import ARCHITECTURES, IDS, make
from shadows import at, bits, layers, optimizer, steady, through, unchanged
from torch import nn

import zo_core

ARCHITECTURE = pytest.mark.parametrize("name", ARCHITECTURES)
HELD = {"recurrent"}  # these read weights elsewhere, and say so
OTHER_KERNELS = {"nested", "mamba"}  # where torch chooses other 16-bit kernels for weights that are not parameters


@ARCHITECTURE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_losses_are_those_of_perturbed_weights_and_weights_stay(name, dtype):
    model, loss = make(name, dtype)
    before = bits(model)
    shadow = optimizer(model)
    probe = shadow.draw(1)[0]
    expected = {}
    for c in (1e-2, -1e-2):  # in place from the same weights each time: going on from one to the other rounds
        other, other_loss = make(name, dtype)
        expected[c] = at(optimizer(other, "inplace"), other_loss, c, probe)
    assert dtype != torch.float32 or expected[1e-2] != expected[-1e-2]
    for c in (1e-2, -1e-2, 1e-2):
        seen = at(shadow, loss, c, probe)
        loose = name in OTHER_KERNELS and dtype != torch.float32
        assert torch.allclose(seen, expected[c], rtol=2e-3) if loose else torch.equal(seen, expected[c])
        assert unchanged(model, before)
    with torch.no_grad():
        clean = at(shadow, loss, 0.0, None)
        assert torch.allclose(clean, loss(), rtol=2e-3) if loose else torch.equal(clean, loss())
    assert (shadow.memory()["held"] > 0) == (name in HELD)


def test_no_drift_in_many_probes():
    model, loss = make("llama", torch.bfloat16)
    before, opt = bits(model), optimizer(model, lr=0.0, probes=4, residual=None)
    for _ in range(50):
        opt.step(loss)
    assert unchanged(model, before)


def test_weights_that_moved_between_steps_are_read_where_they_are():
    (model, loss), (twin, twin_loss) = make("llama"), make("llama")
    opt, other = optimizer(model), optimizer(twin, "inplace")
    for _ in range(3):  # until the order of reading is known
        assert torch.allclose(opt.step(loss), other.step(twin_loss), rtol=1e-5)
    old = [p.data for p in model.parameters()]
    for p, data in zip(model.parameters(), old, strict=True):
        p.data = data.clone()
        data.fill_(torch.nan)
    for _ in range(2):
        assert torch.allclose(opt.step(loss), other.step(twin_loss), rtol=1e-5)


def test_weights_of_another_shape_in_the_same_place_are_read_as_they_are():
    torch_layers, x = [nn.Sequential(nn.Linear(8, 16), nn.Tanh()) for _ in range(2)], torch.randn(4, 8)
    torch_layers[1].load_state_dict(torch_layers[0].state_dict())
    opts = [optimizer(m, engine) for m, engine in zip(torch_layers, ("shadow", "inplace"), strict=True)]
    smaller, larger = (lambda d: d[:8]), (lambda d: torch.cat([d, d, d]))  # smaller, at the same address
    for change in (lambda d: d, smaller, larger):
        for m in torch_layers:
            for p in m.parameters():
                p.data = change(p.data)
        for _ in range(3):
            seen = [o.step(lambda m=m: m(x).square().mean()) for o, m in zip(opts, torch_layers, strict=True)]
            assert torch.allclose(seen[0], seen[1], rtol=1e-5)


@pytest.mark.parametrize("width", [16, 300], ids=["one buffer", "many"])
def test_a_module_that_lends_its_place_in_the_closure_is_perturbed_all_the_same(width):
    twins = [nn.Sequential(*(nn.Linear(width, width) for _ in range(6))) for _ in range(2)]
    twins[1].load_state_dict(twins[0].state_dict())
    draw = torch.Generator().manual_seed(0)
    x, other = torch.randn(4, width, generator=draw), torch.randn(width, width, generator=draw) / width

    def loss(m):
        h = m(x)
        return (h - torch.func.functional_call(m, {"5.weight": other, "5.bias": other[0]}, (x,))).square().mean()

    opts = [optimizer(m, engine, lr=0.0) for m, engine in zip(twins, ("shadow", "inplace"), strict=True)]
    for _ in range(5):
        seen = [o.step(lambda m=m: loss(m)) for o, m in zip(opts, twins, strict=True)]
        assert torch.allclose(seen[0], seen[1], rtol=1e-4, atol=1e-5)


def test_a_tensor_read_both_ways_is_perturbed_once():
    twins, x = [nn.Linear(8, 1, bias=False), nn.Linear(8, 1, bias=False)], torch.randn(4, 8)
    twins[1].load_state_dict(twins[0].state_dict())

    def at_once(model, engine):
        w = model.weight
        return at(
            optimizer(model, engine), lambda: model(x).square().sum() + (x @ w.t()).sum(), 1e-2, torch.tensor([5])
        )

    assert torch.allclose(at_once(twins[0], "shadow"), at_once(twins[1], "inplace"), rtol=1e-6)


def test_generate_inside_the_closure():
    model, _ = make("llama")
    opt, before = optimizer(model, lr=0.0), bits(model)
    plain = model.generate(IDS[:, :4], max_new_tokens=5, do_sample=False)
    outputs = []

    def reward():
        outputs.append(model.generate(IDS[:, :4], max_new_tokens=5, do_sample=False))
        return float((outputs[-1] == plain).float().mean())

    opt.step(reward)
    assert unchanged(model, before) and len(outputs) >= 2


def test_inference_mode_and_autocast_inside_the_closure():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    x, probe = torch.randn(5, 8), torch.tensor([2])

    def loss():
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            return model(x).float().square().mean()

    expected = at(optimizer(copy.deepcopy(model), "shadow"), loss, 0.0, probe)
    other = copy.deepcopy(model)
    opt = optimizer(other, "inplace")
    opt._prepare()._move((probe, opt._prepare().space.full(1e-2)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = other(x).float().square().mean()
    opt = optimizer(model)
    assert torch.equal(at(opt, loss, 1e-2, probe), expected)
    assert opt.memory()["scratch"] <= 2 * (8 * 8 * 2 + 8 * 2 + 128)  # made in bfloat16 at once


def test_steps_in_inference_mode_and_out_of_it():
    model, loss = make("llama")
    before, opt, results = bits(model), optimizer(model, lr=0.0), []
    for inside in (True, True, False, False, True, False):
        with torch.inference_mode(inside):
            opt._own["stream"].zero_()
            results.append(opt.step(loss).clone())
    assert unchanged(model, before) and len(set(map(float, results))) == 1


def test_the_engine_must_be_known_and_have_a_module():
    model, loss = make("llama")
    with pytest.raises(ValueError, match="engine"):
        zo_core.MeZO(model, lr=1e-3, engine="magic")
    with pytest.raises(ValueError, match="module="):
        zo_core.MeZO(model.parameters(), lr=1e-3, engine="shadow")
    groups = [{"params": list(model.parameters())}]
    assert zo_core.MeZO(groups, lr=1e-3).engine == "inplace"
    before = bits(model)
    opt = zo_core.MeZO(groups, lr=0.0, module=model)
    opt.step(loss)
    assert opt.engine == "shadow" and unchanged(model, before)


def test_modules_in_threads():
    model = nn.ModuleList([nn.Linear(64, 64) for _ in range(8)])
    x, opt, probe = torch.randn(4, 64), optimizer(model), torch.tensor([1])
    with ThreadPoolExecutor(8) as pool:

        def loss():
            with torch.no_grad():
                return sum(pool.map(lambda layer: torch.no_grad()(layer)(x).square().mean(), model))

        results = [at(opt, loss, 1e-2, probe) for _ in range(40)]
    assert all(torch.equal(r, results[0]) for r in results)


def test_an_order_that_changes_changes_no_result(monkeypatch):
    model, order = layers(monkeypatch), [0, 1, 2, 3, 4, 5]
    closure = through(model, order)
    opt, probe, _ = steady(closure, model)
    for change in ([5, 4, 3, 2, 1, 0], [0, 0, 1, 2, 3], [3, 1, 3, 1, 5], [0, 1, 2, 3, 4, 5]):
        order[:] = change
        expected = at(optimizer(model), closure, 1e-2, probe)
        assert all(torch.equal(at(opt, closure, 1e-2, probe), expected) for _ in range(3))


def test_a_tensor_read_in_two_dtypes_is_perturbed_in_both():
    twins, x = [nn.Linear(8, 8, bias=False) for _ in range(2)], torch.randn(4, 8)
    twins[1].load_state_dict(twins[0].state_dict())

    def loss(m):
        with torch.autocast("cpu", torch.bfloat16):
            return m(x).float().square().mean() + m.weight.sum()

    opts = [optimizer(m, engine, lr=0.0) for m, engine in zip(twins, ("shadow", "inplace"), strict=True)]
    for _ in range(4):
        seen = [o.step(lambda m=m: loss(m)) for o, m in zip(opts, twins, strict=True)]
        assert torch.allclose(seen[0], seen[1], rtol=1e-3)


def test_a_step_inside_the_closure_over_other_parameters_leaves_the_probe_alone():
    twins, x = [nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)) for _ in range(2)], torch.randn(4, 8)
    twins[1].load_state_dict(twins[0].state_dict())
    pairs = [
        [optimizer(part.parameters(), engine, module=m, lr=lr) for part, lr in ((m[1], 1e-2), (m[0], 0.0))]
        for m, engine in zip(twins, ("shadow", "inplace"), strict=True)
    ]
    for _ in range(4):
        seen = []
        for m, (outer, inner) in zip(twins, pairs, strict=True):

            def loss(m=m):
                return m(x).square().mean()

            seen.append(outer.step(lambda inner=inner, loss=loss: (inner.step(loss), loss())[1]))
        assert torch.allclose(seen[0], seen[1], rtol=1e-5, atol=1e-6)
    assert pairs[0][0].memory()["held"] == 0


def test_autocast_around_the_step_sees_each_probe():
    for engine in ("shadow", "inplace"):
        model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)), torch.randn(5, 8)
        opt, seen = optimizer(model, engine), []
        with torch.autocast("cpu", torch.bfloat16):
            opt.step(lambda: (seen.append(float(model(x).float().square().mean())), seen[-1])[1])  # noqa: B023
        assert seen[0] != seen[-1]


def test_an_autocast_cache_inside_one_without_does_not_outlive_an_evaluation():
    model, x = nn.Linear(8, 1), torch.randn(5, 8)
    opt, seen = optimizer(model, "inplace", eps=0.1), []

    def closure():
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=True):
            seen.append(float(model(x).float().square().mean()))
        return seen[-1]

    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        opt.step(closure)
    assert seen[0] != seen[1]


def test_modules_that_branch_on_overrides_take_one_path():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x = torch.randn(3, 5, 16)
    opt, probe, first = steady(lambda: model(x).square().mean(), model)
    assert torch.equal(at(opt, lambda: model(x).square().mean(), 1e-2, probe), first)
