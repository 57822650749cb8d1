"""The shadow engine: what parameters are inside a closure and after it."""

import pytest
import torch
from shadows import at, layers, optimizer, steady
from torch import nn


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


def test_an_attribute_of_the_engine_s_name_is_the_user_s():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model[1].weight.requires_grad_(False)._parameter = nn.Parameter(torch.zeros(4))
    kept = model[1].weight
    optimizer(model).step(lambda: model(torch.ones(2, 4)).sum())
    assert model[1].weight is kept


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
