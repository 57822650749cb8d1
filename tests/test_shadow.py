"""The shadow engine: what the in-place engine computes, with weights that are never written to be probed."""

import copy
import os
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import pytest
import torch
from models import ARCHITECTURES, IDS, make
from torch import nn

import zo_core
from zo_core.engines import scratch, shadow

ARCHITECTURE = pytest.mark.parametrize("name", ARCHITECTURES)
HELD = {"recurrent"}  # these read weights elsewhere, and say so
OTHER_KERNELS = {"nested", "mamba"}  # where torch chooses other 16-bit kernels for weights that are not parameters


def optimizer(model, engine="shadow", **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(read elsewhere|less than the spacing).*")
        return zo_core.MeZO(
            model, **{"lr": 1e-3, "eps": 1e-2, "seed": 3, "engine": engine, "residual": None, **options}
        )


def bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def unchanged(model, before):
    assert all(type(p) is nn.Parameter for m in model.modules() for p in m._parameters.values() if p is not None)
    return all(torch.equal(p.view(torch.uint8), before[n].view(torch.uint8)) for n, p in model.named_parameters())


def at(opt, loss, c, probe):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*read elsewhere.*")
        try:
            return opt._prepare().evaluate(loss, c, probe)
        finally:
            opt._prepare().restore()


def copied(monkeypatch, engine):
    """A list that gets the numbers of the tensors of each pass over copies."""
    seen, original = [], engine._fill
    monkeypatch.setattr(
        engine, "_fill", lambda keys: (slot := original(keys), seen.append([i for i, _ in slot.content.copies]))[0]
    )
    return seen


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
        assert torch.equal(at(shadow, loss, 0.0, None), loss())
    assert (shadow.memory()["held"] > 0) == (name in HELD)


@ARCHITECTURE
def test_an_exception_at_any_module_boundary_leaves_every_bit(name):
    model, loss = make(name, torch.bfloat16)
    opt = optimizer(model, weight_decay=0.5)
    before, calls, stop = bits(model), [], [None]

    def hook(module, *_):
        calls.append(module)
        if len(calls) == stop[0]:
            raise {0: RuntimeError, 1: KeyboardInterrupt, 2: torch.OutOfMemoryError}[len(calls) % 3]

    for module in model.modules():
        module.register_forward_pre_hook(hook)
        module.register_forward_hook(hook)
    probe = opt.draw(1)[0]
    at(opt, loss, 1e-2, probe)  # the comparison of the first evaluation is behind us
    calls.clear()
    at(opt, loss, 1e-2, probe)
    for stop[0] in range(1, len(calls) + 1):
        del calls[:]
        stream = opt.state_dict()["state"]["zo"]["stream"].clone()
        with pytest.raises((RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError)):
            opt.step(loss)
        assert unchanged(model, before)
        assert torch.equal(opt.state_dict()["state"]["zo"]["stream"], stream)
    stop[0] = None
    opt.step(loss)
    assert not unchanged(model, before) and opt.updates == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGALRM])
@pytest.mark.parametrize("where", ["_perturb", "_find_sources", "_end", "restore", "update_"])
@pytest.mark.parametrize("nth", [1, 3])
def test_a_signal_anywhere_in_a_step_is_all_or_nothing(monkeypatch, number, where, nth):
    class Stop(BaseException):
        pass

    def stop(*_):
        raise Stop

    (model, loss), (other, other_loss) = make("llama", torch.bfloat16), make("llama", torch.bfloat16)
    before = bits(model)
    opt, whole = optimizer(model), optimizer(other)
    whole.step(other_loss)
    engine, calls = opt._prepare(), []
    target = engine.space if where == "update_" else engine
    original = getattr(target, where)

    def interrupted(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(0)
        if len(calls) == (1 if where == "update_" else nth):
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(target, where, interrupted)
    previous = signal.signal(number, stop)
    try:
        with pytest.raises(Stop):
            opt.step(loss)
    finally:
        signal.signal(number, previous)
    assert unchanged(model, bits(other) if opt.updates else before)


def test_no_drift_in_many_probes():
    model, loss = make("llama", torch.bfloat16)
    before, opt = bits(model), optimizer(model, lr=0.0, probes=4, residual=None)
    for _ in range(50):
        opt.step(loss)
    assert unchanged(model, before)


@pytest.mark.parametrize("least", [0, shadow._LEAST])
def test_scratch_is_at_most_twice_the_largest_tensors_read_together(monkeypatch, least):
    monkeypatch.setattr(shadow, "_LEAST", least)
    for name in ("llama", "gpt2", "mixtral"):
        model, loss = make(name)
        opt = optimizer(model)
        for _ in range(3):
            opt.step(loss)
        largest = max(sum(p.nbytes + 64 for p in m._parameters.values() if p is not None) for m in model.modules())
        memory = opt.memory()
        assert 0 < memory["scratch"] <= 2 * max(largest, shadow._LEAST) and memory["held"] == 0
        assert memory["weights"] == sum(p.nbytes for p in model.parameters())


def test_scratch_is_free_again_when_layouts_are_forgotten(monkeypatch):
    monkeypatch.setattr(scratch, "_MOST", 1)
    model, loss = make("llama")
    opt, probe = optimizer(model), torch.tensor([1])
    results = [at(opt, loss, 1e-2, probe) for _ in range(6)]
    assert all(torch.equal(r, results[0]) for r in results)
    assert all(slot.free() for slot in opt._prepare()._slots)


def test_an_embedding_perturbs_only_rows_looked_up(monkeypatch):
    model = nn.Sequential(nn.Embedding(1000, 8), nn.Linear(8, 1))
    opt = optimizer(model)
    for _ in range(2):
        opt.step(lambda: model(torch.tensor([[3, 999, 3]])).sum())
    assert opt.memory()["scratch"] < 1000
    with pytest.raises(IndexError, match=r"0\.weight"):
        opt.step(lambda: model(torch.tensor([[1000]])).sum())


@pytest.mark.parametrize("name", ["llama", "recurrent"])
def test_tensors_that_a_probe_leaves_out_cost_nothing(monkeypatch, name):
    (model, loss), (twin, twin_loss), probe = make(name), make(name), torch.tensor([6])
    opt, other, before = optimizer(model), optimizer(twin, "inplace"), bits(model)
    for c in (1e-2, -1e-2):  # the comparison is behind us when results differ
        at(opt, loss, c, probe)
    engine, count = opt._prepare(), len(before)
    seen = copied(monkeypatch, engine)
    for leave_out in (range(3, count), [0], range(count // 2, count // 2 + 2), range(count)):
        del seen[:]
        with torch.no_grad():
            got = engine.evaluate(loss, 1e-2, probe, leave_out)
            expected = other._prepare().evaluate(twin_loss, 1e-2, probe, leave_out)
            engine.restore(), other._prepare().restore()
        assert torch.allclose(got, expected, rtol=1e-5) and not set(chain(*seen)) & set(leave_out)
        assert unchanged(model, before)
    assert torch.equal(got, loss())


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


def test_what_is_copied_ahead_follows_a_new_order(monkeypatch):
    layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
    x, order = torch.randn(4, 8), [0, 1, 2]

    def loss():
        h = x
        for i in order:
            h = layers[i](h)
        return h.square().mean()

    opt, probe = optimizer(layers), torch.tensor([5])
    seen = copied(monkeypatch, opt._prepare())
    for c in (1e-2, -1e-2):
        at(opt, loss, c, probe)
    assert seen[-1] == [0, 1, 2]
    order.reverse()
    for c in (1e-2, -1e-2):
        at(opt, loss, c, probe)
    assert seen[-1] == [2, 1, 0]


def test_tensors_read_elsewhere_are_named_once():
    model, loss = make("recurrent")
    opt = zo_core.MeZO(model, lr=1e-3)
    with pytest.warns(UserWarning, match=r"^head\.weight, head\.bias: read elsewhere"):
        opt.step(loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(loss)


def test_a_metric_that_swallows_not_a_number_is_still_compared():
    model, _ = make("recurrent")
    opt = optimizer(model)

    def metric():
        return float(model(IDS).argmax(-1).float().mean())  # of not-a-number, 0

    with pytest.warns(UserWarning, match=r"head\.weight"):
        opt.step(metric)


def test_a_closure_that_is_never_the_same_is_not_blamed():
    model, loss = make("llama")
    opt, values = optimizer(model), iter(range(1, 100))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(lambda: loss() * next(values))
    assert opt.memory()["held"] == 0


def test_an_error_of_the_closure_s_own_in_the_comparison_is_raised():
    model, loss = make("llama")
    opt, calls = optimizer(model), []

    def closure():
        calls.append(0)
        if len(calls) == 2:
            raise ValueError("mine")
        return loss()

    with pytest.raises(ValueError, match="mine"):
        opt.step(closure)


@pytest.mark.parametrize("way", ["Module.compile", "torch.compile"])
def test_compiled_modules_are_perturbed(way):
    (model, loss), probe = make("nested"), torch.tensor([5])
    expected = float(at(optimizer(model, "inplace"), loss, 1e-2, probe))
    model, loss = make("nested")
    used = model
    if way == "Module.compile":
        model.compile(backend="eager")
    else:
        used = torch.compile(model, backend="eager")
    with pytest.warns(UserWarning, match="compiled"):
        opt = zo_core.MeZO(used, lr=1e-3, eps=1e-2, seed=3)
    before = bits(model)

    def compiled():
        return nn.functional.cross_entropy(used(IDS).flatten(0, 1).float(), IDS.flatten())

    for _ in range(2):
        assert float(at(opt, compiled, 1e-2, probe)) == pytest.approx(expected, rel=1e-5)
        assert float(at(opt, compiled, -1e-2, probe)) != pytest.approx(expected, rel=1e-5)
    assert unchanged(model, before)


def test_a_compiled_function_over_the_model_is_refused():
    model, loss = make("nested")
    before = bits(model)
    with pytest.raises(RuntimeError, match=r"embed\.weight is perturbed as it is read.*engine='inplace'"):
        optimizer(model).step(torch.compile(loss, backend="eager"))
    assert unchanged(model, before)


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


def test_frozen_weights_are_neither_copied_nor_touched():
    model, loss = make("llama")
    for name, p in model.named_parameters():
        p.requires_grad_("norm" in name)
    before = bits(model)
    opt = optimizer(model)
    opt.step(loss)
    assert opt.memory()["scratch"] < 1000
    after = bits(model)
    assert {n for n in before if not torch.equal(before[n], after[n])} == {n for n in before if "norm" in n}


def test_parameters_answer_for_themselves_inside_a_closure():
    model = nn.Sequential(nn.Linear(4, 4))
    opt, seen = optimizer(model), []

    def closure():
        w = model[0].weight
        assert isinstance(w, nn.Parameter) and w.requires_grad and w.is_leaf and w.shape == (4, 4) and len(w) == 4
        assert next(model.parameters()).device.type == "cpu" and model[0].weight.dtype == torch.float32
        assert sum(p.numel() for p in model.parameters()) == 20
        addresses = {w.data_ptr(), model[0].bias.data_ptr()}
        assert len(addresses) == 2
        kept.append(w)
        seen.append(w.clone())
        return w.square().sum()

    kept = []
    opt.step(closure)
    assert not torch.equal(seen[0], seen[-1])
    assert torch.equal(kept[0].clone(), model[0].weight)  # after the step it is the parameter


def test_writing_a_weight_in_the_closure_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    before = bits(model)
    for write in (
        lambda w: w.zero_(), lambda w: w.__setitem__(0, 1.0), lambda w: torch.add(w, 1, out=w), lambda w: nn.init.ones_(w),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"writes 0\.weight during an evaluation"):
            optimizer(model).step(lambda write=write: (write(model[0].weight), 1.0)[1])
    assert unchanged(model, before)


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


class Keeps(nn.Module):
    """Keeps references to weights in the ways that a module can."""

    def __init__(self, how):
        super().__init__()
        self.a, self.bn = nn.Linear(16, 16), nn.BatchNorm1d(16)
        self.kept = {"dict": {"x": [self.a.weight]}, "view": self.a.weight.t(), "detached": self.a.weight.detach()}.get(
            how
        )
        if how == "frozen tie":
            self.b = nn.Linear(16, 16)
            self.b.weight = nn.Parameter(self.a.weight.data, requires_grad=False)
        if how == "closure":
            weight = self.a.weight
            self.read = lambda: weight
        self.how = how

    def forward(self, x):
        w = {"dict": lambda: self.kept["x"][0], "view": lambda: self.kept.t(), "detached": lambda: self.kept,
             "frozen tie": lambda: self.b.weight, "closure": lambda: self.read()}[self.how]()  # fmt: skip
        return self.bn(self.a(x) + nn.functional.linear(x, w))


@pytest.mark.parametrize("how", ["dict", "view", "detached", "frozen tie", "closure"])
def test_weights_that_are_kept_elsewhere_are_perturbed_there_too(how):
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        model, x = Keeps(how), torch.randn(8, 16)
    twin = Keeps(how)
    twin.load_state_dict(model.state_dict())
    opt, other, before, probe = optimizer(model), optimizer(twin, "inplace"), bits(model), torch.tensor([4])
    for c in (1e-2, -1e-2):
        expected = at(other, lambda: (twin(x) - 1).square().mean(), c, probe)
        assert torch.allclose(at(opt, lambda: (model(x) - 1).square().mean(), c, probe), expected, rtol=1e-5)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert (opt.memory()["held"] > 0) == (how not in ("dict", "closure")) and model.bn.running_mean.isfinite().all()


def test_a_flat_metric_is_compared_again_when_it_moves():
    model, _ = make("recurrent")
    opt = optimizer(model)
    for _ in range(2):
        opt.step(lambda: 0.0)
    with pytest.warns(UserWarning, match=r"head\.weight"):
        opt.step(lambda: model(IDS).square().mean())


def test_modules_in_threads():
    model = nn.ModuleList([nn.Linear(64, 64) for _ in range(8)])
    x, opt, probe = torch.randn(4, 64), optimizer(model), torch.tensor([1])
    with ThreadPoolExecutor(8) as pool:

        def loss():
            with torch.no_grad():
                return sum(pool.map(lambda layer: torch.no_grad()(layer)(x).square().mean(), model))

        results = [at(opt, loss, 1e-2, probe) for _ in range(40)]
    assert all(torch.equal(r, results[0]) for r in results)


def steady(closure, model, **options):
    """An engine, and a probe, when it knows in which order the closure reads."""
    opt, probe = optimizer(model, **options), torch.tensor([1])
    results = [at(opt, closure, 1e-2, probe) for _ in range(3)]
    assert opt._prepare()._steady and torch.equal(results[0], results[-1])
    return opt, probe, results[0]


def layers(monkeypatch, n=6):
    """Linear layers of which two fit into a buffer."""
    monkeypatch.setattr(shadow, "_LEAST", 3 * 4096)
    return nn.ModuleList([nn.Linear(32, 32) for _ in range(n)])


def through(model, order):
    """A closure that reads layers in this order, whatever it is by then."""

    def closure():
        x = torch.ones(32)
        for i in order:
            x = model[i](x)
        return x.sum()

    return closure


def test_reads_in_a_known_order_are_of_plain_copies(monkeypatch):
    model, loss = make("llama")
    engine = optimizer(model)._prepare()
    reads, read = [], engine.read
    monkeypatch.setattr(
        engine, "read", lambda stands, *rest, **more: (reads.append(len(stands)), read(stands, *rest, **more))[1]
    )
    counts, results = [], []
    for _ in range(5):
        del reads[:]
        with torch.no_grad():
            results.append(engine.evaluate(loss, 1e-2, torch.tensor([1])))
        counts.append(sum(reads))
    assert counts[-1] == counts[-2] < counts[0] / 4 and all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("kept", ["nothing", "a copy", "a graph", "gradients"])
def test_copies_that_modules_were_lent_serve_again_unless_somebody_keeps_them(monkeypatch, kept):
    model, keep, results, found = layers(monkeypatch), [], [], []

    def keeps(layer, x):
        if kept == "a copy":
            keep.extend([layer.weight, layer.weight.detach().clone()])
        elif kept == "a graph":
            x = x.requires_grad_()
            out = (layer.weight * x).tanh().sum()  # which saves the weight itself, no view of it
            keep.extend([x, out, *torch.autograd.grad(out, x, retain_graph=True)])
        elif kept == "gradients":
            layer(x).sum().backward()

    def closure():
        x = torch.ones(32)
        found.append([])
        for i, layer in enumerate(model):
            assert layer.weight.grad is None
            found[-1].append(id(layer.weight))
            if i == 3 and len(found) == 6:
                with torch.enable_grad():
                    keeps(layer, x.clone())
            x = layer(x)
        return x.tanh().sum()

    opt = optimizer(model)
    for turn in range(8):
        results.append(at(opt, closure, 1e-2, torch.tensor([1])))
        at(opt, closure, 1e-2, torch.tensor([2 + turn]))  # other content in the same memory
    assert all(torch.equal(r, results[0]) for r in results)
    assert found[-1] == found[-3] and len(set(found[-1]) - set(map(id, model.parameters()))) == 3
    if kept == "a copy":
        assert torch.equal(*keep) and keep[0] is not model[3].weight and id(keep[0]) not in found[-1]
    if kept == "a graph":
        assert torch.equal(torch.autograd.grad(keep[1], keep[0])[0], keep[2])
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 5, 4]], ids=str)
def test_a_probe_and_its_mirror_make_the_last_copies_at_once(monkeypatch, order):
    model, now = layers(monkeypatch), [0, 1, 2, 3, 4, 5]
    closure = through(model, now)
    opt, probe, _ = steady(closure, model)
    engine, before = opt._prepare(), bits(model)
    seen, both = copied(monkeypatch, engine), []
    original = engine.space.perturb

    def perturb(which, sources, out, mirrors=()):
        both.extend(which if mirrors else ())
        return original(which, sources, out, mirrors)

    monkeypatch.setattr(engine.space, "perturb", perturb)
    for now[:] in ([0, 1, 2, 3, 4, 5], order):  # the second evaluation does not go where the first one did
        expected = [at(optimizer(model), closure, c, probe) for c in (1e-2, -1e-2)]
        for turn in range(3):
            del seen[:], both[:]
            with torch.no_grad():
                first = engine.evaluate(closure, 1e-2, probe, mirrored=True)
                if turn == 1:  # a probe in between: what was made ahead is not of it
                    engine.evaluate(closure, -1e-2, torch.tensor([9]))
                second = engine.evaluate(closure, -1e-2, probe)
            engine.restore()
            assert torch.equal(first, expected[0]) and torch.equal(second, expected[1]) and unchanged(model, before)
        if order == now[:6] == [0, 1, 2, 3, 4, 5]:
            assert both and len(list(chain(*seen))) == 2 * 12 - len(both)


@pytest.mark.parametrize("change", ["data", "requires_grad", "hook", "no change"])
def test_copies_that_a_closure_changes_do_not_serve_again(monkeypatch, change):
    model, calls, flags = layers(monkeypatch), [], []

    def closure():
        x = torch.ones(32)
        for layer in model:
            x = layer(x)
        calls.append(0)
        if len(calls) == 8:
            w = model[5].weight
            assert all(w is not p for p in opt.param_groups[0]["params"])
            if change == "data":
                w.data = w.data.clone()
            elif change == "requires_grad":
                w.requires_grad_(False)
            elif change == "hook":
                with torch.enable_grad():
                    w.register_hook(lambda g: 0 * g)
        flags.append((model[5].weight.requires_grad, model[5].weight._backward_hooks))
        return x.sum()

    opt = optimizer(model, lr=0.0)
    for _ in range(10):
        opt.step(closure)
    assert flags[-1] == flags[-2] == (True, None)
    slots = opt._prepare()._slots
    assert all(slot.free() for slot in slots) and opt.memory()["scratch"] == sum(s.bytes.nbytes for s in slots)


def test_a_held_weight_that_a_closure_replaces_is_put_back():
    class Scaled(nn.Parameter):
        pass

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model[0].weight = Scaled(model[0].weight.detach().clone())
    before, opt = bits(model), optimizer(model, lr=0.0)

    def closure():
        model[0].weight.data = model[0].weight.data.clone()
        return model(torch.ones(2, 4)).sum()

    opt.step(closure)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("way", ["plain", "set again"])
def test_a_recurrent_module_s_own_list_keeps_its_parameters(way):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.lstm, self.last = nn.Linear(8, 8), nn.LSTM(8, 8, 2), nn.Linear(8, 1)

        def forward(self, x):
            return self.last(self.lstm(self.first(x))[0])

    twins, x, calls = [Model(), Model()], torch.randn(5, 2, 8), []
    twins[1].load_state_dict(twins[0].state_dict())

    def loss(model):
        out = model(x).square().mean()
        if way == "set again" and model is twins[0] and len(calls) > 6:
            for name in model.lstm._flat_weights_names:
                setattr(model.lstm, name, getattr(model.lstm, name))
        calls.append(0)
        return out

    opts = [optimizer(m, engine, lr=0.0) for m, engine in zip(twins, ("shadow", "inplace"), strict=True)]
    for _ in range(8):
        seen = [o.step(lambda m=m: loss(m)) for o, m in zip(opts, twins, strict=True)]
        assert torch.allclose(seen[0], seen[1], rtol=1e-5)
    own = set(map(id, twins[0].parameters()))
    assert all(id(w) in own for w in twins[0].lstm._flat_weights) and opts[0].memory()["held"] == 0


def test_a_step_inside_the_closure_over_the_same_parameters_is_refused():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), torch.randn(3, 4)
    before, (outer, inner) = bits(model), (optimizer(model), optimizer(model))
    inner.step(lambda: model(x).sum())
    before = bits(model)
    with pytest.raises(RuntimeError, match=r"0\.weight.*in use by the optimizer whose closure this is"):
        outer.step(lambda: inner.step(lambda: model(x).sum()))
    assert unchanged(model, before) and all(type(p) is nn.Parameter for p in model.parameters())


def test_the_two_evaluations_of_a_step_share_noise(monkeypatch):
    model, loss = make("llama", torch.bfloat16)
    opt, plain = optimizer(model), optimizer(copy.deepcopy(model))
    twin_loss = lambda: plain.module(input_ids=IDS, labels=IDS).loss  # noqa: E731
    evaluate = shadow.ShadowEngine.evaluate
    for _ in range(4):
        mirrored = opt.step(loss)
        with monkeypatch.context() as patch:
            patch.setattr(
                shadow.ShadowEngine, "evaluate", lambda self, *args: evaluate(self, *args[:4])
            )  # no word of what comes next
            assert torch.equal(plain.step(twin_loss), mirrored)


def test_weights_that_a_closure_holds_keep_their_values(monkeypatch):
    model, again = layers(monkeypatch), []

    def closure():
        held, total = [], torch.zeros(())
        for layer in model:
            total += layer.bias.sum()
            held.append(layer.weight)
        total += sum(w.square().sum() for w in held)
        return total + sum(w.pow(3).sum() for w in (*held, *held) if again)

    opt, probe, _ = steady(closure, model)
    again.append(True)
    expected = at(optimizer(model), closure, 1e-2, probe)
    assert all(torch.equal(at(opt, closure, 1e-2, probe), expected) for _ in range(3))


def test_an_order_that_changes_changes_no_result(monkeypatch):
    model, order = layers(monkeypatch), [0, 1, 2, 3, 4, 5]
    closure = through(model, order)
    opt, probe, _ = steady(closure, model)
    for change in ([5, 4, 3, 2, 1, 0], [0, 0, 1, 2, 3], [3, 1, 3, 1, 5], [0, 1, 2, 3, 4, 5]):
        order[:] = change
        expected = at(optimizer(model), closure, 1e-2, probe)
        assert all(torch.equal(at(opt, closure, 1e-2, probe), expected) for _ in range(3))


@pytest.mark.parametrize("which", [1, 4])
def test_writing_a_copy_is_found_when_its_memory_is_needed_or_at_the_end(monkeypatch, which):
    model, write = layers(monkeypatch), []

    def closure():
        x = torch.ones(32)
        for i, layer in enumerate(model):
            if i in write:
                layer.weight.add_(1)
            x = layer(x)
        return x.sum()

    opt, probe, first = steady(closure, model)
    before = bits(model)
    write.append(which)
    with pytest.raises(RuntimeError, match=rf"{which}\.weight.* during an evaluation"):
        at(opt, closure, 1e-2, probe)
    assert unchanged(model, before)
    write.clear()
    assert torch.equal(at(opt, closure, 1e-2, probe), first)


def test_a_module_that_is_not_lent_copies_leaves_the_order_known(monkeypatch):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.LSTM(8, 8)), torch.randn(5, 8)
    steady(lambda: model(x)[0].square().mean(), model)


def test_modules_that_branch_on_overrides_take_one_path():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x = torch.randn(3, 5, 16)
    opt, probe, first = steady(lambda: model(x).square().mean(), model)
    assert torch.equal(at(opt, lambda: model(x).square().mean(), 1e-2, probe), first)


def test_a_copy_that_is_tied_inside_a_closure_is_the_parameter_afterwards():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    tie = []

    def closure():
        x = model[0](torch.ones(4))
        if tie:
            model.append(nn.Linear(4, 4))
            model[2].weight, model[2].bias = model[1].weight, model[1].bias
        return model[1](x).sum()

    opt, probe, _ = steady(closure, model)
    tie.append(1)
    at(opt, closure, 1e-2, probe)
    assert model[2].weight is model[1].weight and model[2].bias is model[1].bias
    assert type(model[1].weight) is nn.Parameter


@pytest.mark.parametrize("late", [False, True], ids=["a stand-in", "a copy"])
def test_what_a_closure_leaves_in_another_module_answers_with_the_next_probe_too(late):
    twins = [nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]) for _ in range(2)]
    twins[1].load_state_dict(twins[0].state_dict())
    tie = []

    def loss(model):
        x = model[0](torch.ones(4))
        if len(model) == 3:
            return model[2](x).sum()
        if tie or not late:
            model.append(nn.Linear(4, 4))
            model[2].weight, model[2].bias = model[1].weight, model[1].bias
        return model[1](x).sum()

    opts = [optimizer(m, engine, lr=0.0) for m, engine in zip(twins, ("shadow", "inplace"), strict=True)]
    for step in range(5):
        tie += [1] * (step == 3)
        seen = [o.step(lambda m=m: loss(m)) for o, m in zip(opts, twins, strict=True)]
        assert torch.allclose(seen[0], seen[1], rtol=1e-5, atol=1e-6)
    assert all(type(p) is nn.Parameter for p in twins[0].parameters()) and twins[0][2].weight is twins[0][1].weight


def test_a_module_that_a_closure_takes_out_has_its_parameters_back():
    model, out = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}), []
    before = dict(model["b"].named_parameters())

    def closure():
        x = model["a"](torch.ones(4))
        if not out:
            out.append(model.pop("b"))
        return out[0](x).sum()

    with pytest.warns(UserWarning, match="no longer a parameter"):
        optimizer(model).step(closure)
    assert all(p is before[name] for name, p in out[0].named_parameters())


@pytest.mark.parametrize("kept", ["a reference", "no gradient"])
def test_what_a_closure_takes_before_it_reads_is_no_copy(monkeypatch, kept):
    twins, refs = [layers(monkeypatch), layers(monkeypatch)], {"shadow": [], "inplace": []}
    twins[1].load_state_dict(twins[0].state_dict())
    calls = []

    def loss(model, engine):
        calls.append(calls[0])
        if calls == [4, 4, 4]:  # the second evaluation of the fifth step
            if kept == "a reference":
                refs[engine].append(model[5].weight)
            else:
                model[5].weight.requires_grad_(False)
        x = torch.ones(32)
        for layer in model:
            x = layer(x)
        return x.sum() + 0.1 * sum(w.square().sum() for w in refs[engine])

    opts = {e: optimizer(m, e, lr=1e-3) for e, m in zip(refs, twins, strict=True)}
    for step in range(8):
        seen = []
        for (e, o), m in zip(opts.items(), twins, strict=True):
            calls[:] = [step]
            seen.append(o.step(lambda m=m, e=e: loss(m, e)))
        assert torch.allclose(seen[0], seen[1], rtol=1e-4, atol=1e-5)
    assert [m[5].weight.requires_grad for m in twins] == [kept == "a reference"] * 2


def test_a_module_replaced_between_steps_leaves_no_stand_in():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    opt = optimizer(model)
    for _ in range(3):
        opt.step(lambda: model(torch.ones(2, 4)).sum())
    model[1] = nn.Linear(4, 4)
    with pytest.warns(UserWarning, match="no longer a parameter"):
        [opt.step(lambda: model(torch.ones(2, 4)).sum()) for _ in range(shadow._LOOK)]
    assert all(type(p) is nn.Parameter for p in model.parameters())


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


def test_an_attribute_of_the_engine_s_name_is_the_user_s():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model[1].weight.requires_grad_(False)._parameter = nn.Parameter(torch.zeros(4))
    kept = model[1].weight
    optimizer(model).step(lambda: model(torch.ones(2, 4)).sum())
    assert model[1].weight is kept


def test_a_scripted_submodule_is_perturbed_in_place():
    model, twin = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        model[1] = torch.jit.script(model[1])
    opts = optimizer(model), optimizer(twin, "inplace")
    for _ in range(3):
        seen = [o.step(lambda m=m: m(torch.ones(2, 4)).sum()) for o, m in zip(opts, (model, twin), strict=True)]
        assert torch.allclose(seen[0], seen[1], rtol=1e-5, atol=1e-6)


def test_parameters_keep_their_attributes_and_subclasses_are_held():
    class Scaled(nn.Parameter):
        pass

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.scale = 3.0
    model[1].weight = Scaled(model[1].weight.detach().clone())
    opt, seen = optimizer(model), []
    for _ in range(3):
        opt.step(
            lambda: (model(torch.ones(2, 4)).sum(), seen.append((model[0].weight.scale, type(model[1].weight))))[0]
        )
    assert set(seen) == {(3.0, Scaled)}


def test_other_tensor_subclasses_have_their_say():
    class Doubled(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            with torch._C.DisableTorchFunctionSubclass():
                return 2 * func(*args, **(kwargs or {}))

    model, x = nn.Linear(3, 3), torch.ones(3, 3).as_subclass(Doubled)
    opt, seen = optimizer(model, lr=0.0, eps=1e-6), []
    opt.step(lambda: (seen.append(float((model.weight * x).sum())), 1.0)[1])
    assert seen[0] == pytest.approx(float((model.weight * x).sum()), abs=1e-3)


def test_a_parameter_that_is_tied_inside_a_closure_is_a_parameter_afterwards():
    model = nn.Sequential(nn.Linear(4, 4))

    def closure():
        if len(model) == 1:
            model.append(nn.Linear(4, 4))
            model[1].weight = model[0].weight
        return model(torch.ones(2, 4)).sum()

    opt = optimizer(model)
    opt.step(closure)
    assert model[1].weight is model[0].weight and type(model[1].weight) is nn.Parameter


def test_a_replaced_parameter_is_named():
    model = nn.Sequential(nn.Linear(4, 4))
    opt = optimizer(model)
    opt.step(lambda: model(torch.ones(2, 4)).sum())
    model[0].weight = nn.Parameter(torch.zeros(4, 4))
    with pytest.warns(UserWarning, match=r"0\.weight: no longer a parameter"):
        [opt.step(lambda: model(torch.ones(2, 4)).sum()) for _ in range(shadow._LOOK)]


def test_autocast_around_the_step_sees_each_probe():
    for engine in ("shadow", "inplace"):
        model, x = nn.Sequential(nn.LSTM(8, 8), nn.Linear(8, 1)), torch.randn(5, 8)
        opt, seen = optimizer(model, engine), []
        with torch.autocast("cpu", torch.bfloat16):
            opt.step(lambda: (seen.append(float(model[1](model[0](x)[0]).float().square().mean())), seen[-1])[1])  # noqa: B023
        assert seen[0] != seen[-1]


def test_what_cannot_be_served_says_so():
    model, x = nn.Sequential(nn.Embedding(9, 4, max_norm=1.0), nn.Linear(4, 1)), torch.tensor([1])
    with pytest.raises(RuntimeError, match=r"embedding writes 0\.weight"):
        optimizer(model).step(lambda: model(x).sum())
    model = nn.Sequential(nn.Linear(4, 1))
    with pytest.raises(RuntimeError, match="torch.func.*engine='inplace'"):
        optimizer(model).step(lambda: torch.func.grad(lambda v: model(v).sum())(torch.ones(4)).sum())
    with pytest.raises(RuntimeError, match=r"wrote one of 0\.weight"):
        optimizer(model).step(lambda: (model[0].weight.detach().mul_(2), 1.0)[1])
    opt = optimizer(model)
    with pytest.raises(RuntimeError, match="state_dict"):
        opt.step(lambda: (opt.state_dict(), 1.0)[1])
    assert all(type(p) is nn.Parameter for p in model.parameters())


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
