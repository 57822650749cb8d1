"""The shadow engine: what fails or is refused leaves every bit of the weights."""

import os
import signal

import pytest
import torch
from models import ARCHITECTURES, make
from shadows import at, bits, layers, optimizer, steady, unchanged
from torch import nn

ARCHITECTURE = pytest.mark.parametrize("name", ARCHITECTURES)


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
    for c in (1e-2, -1e-2):  # the comparison of the first evaluation is behind us
        at(opt, loss, c, probe)
    calls.clear()
    at(opt, loss, 1e-2, probe)
    for stop[0] in range(1, len(calls) + 1):
        del calls[:]
        stream = opt.state_dict()["state"][0]["zo"]["stream"].clone()
        with pytest.raises((RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError)):
            opt.step(loss)
        assert unchanged(model, before)
        assert torch.equal(opt.state_dict()["state"][0]["zo"]["stream"], stream)
    stop[0] = None
    opt.step(loss)
    assert not unchanged(model, before) and opt.updates == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGALRM])
@pytest.mark.parametrize("where", ["_perturb", "_begin", "_fill", "restore", "update_"])
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


def test_writing_a_weight_in_the_closure_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    before = bits(model)
    for write in (
        lambda w: w.zero_(), lambda w: w.__setitem__(0, 1.0), lambda w: torch.add(w, 1, out=w), lambda w: nn.init.ones_(w),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"writes 0\.weight during an evaluation"):
            optimizer(model).step(lambda write=write: (write(model[0].weight), 1.0)[1])
    assert unchanged(model, before)


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


def test_a_step_inside_the_closure_over_the_same_parameters_is_refused():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), torch.randn(3, 4)
    before, (outer, inner) = bits(model), (optimizer(model), optimizer(model))
    inner.step(lambda: model(x).sum())
    before = bits(model)
    with pytest.raises(RuntimeError, match=r"0\.weight.*in use by the optimizer whose closure this is"):
        outer.step(lambda: inner.step(lambda: model(x).sum()))
    assert unchanged(model, before) and all(type(p) is nn.Parameter for p in model.parameters())


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
