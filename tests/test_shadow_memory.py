"""The shadow engine: what its copies take, and that those somebody keeps stay as they are."""

import pytest
import torch
from models import make
from shadows import at, bits, layers, optimizer, passes, steady, unchanged
from torch import nn

from zo_core.engines import structure
from zo_core.engines.scratch import Scratch


@pytest.mark.parametrize("most", [0, 1000, structure.GROUP])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_scratch_is_two_of_the_largest_group_and_a_group_as_large_as_said(monkeypatch, name, most):
    monkeypatch.setattr(structure, "GROUP", most)
    model, loss = make(name)
    opt = optimizer(model)
    for _ in range(3):
        opt.step(loss)
    own = max(sum(p.nbytes + 64 for p in m._parameters.values() if p is not None) for m in model.modules())
    whole = sum(p.nbytes + 64 for p in model.parameters())
    memory = opt.memory()
    assert 0 < memory["scratch"] <= 2 * max(own, min(2 * most, whole)) and memory["held"] == 0
    assert memory["weights"] == sum(p.nbytes for p in model.parameters())


def test_two_buffers_take_turns_on_a_gpu_and_one_of_them_grows():
    scratch = Scratch(torch.device("cpu"))
    scratch.turns = 2
    first, second = scratch.take(1000), scratch.take(1000)
    assert first is not second and scratch.take(900) is first and scratch.take(1000) is second
    large = scratch.take(5000)
    assert scratch.buffers == [second, large] and scratch.take(1000) is second and scratch.take(5000) is large
    assert scratch.peak == 6000


def test_neighbours_are_one_group_but_not_blocks_of_a_list():
    block = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)]
    model = nn.ModuleDict(
        {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4), "blocks": nn.ModuleList(block)}
    )
    assert structure.groups(model, [*model.parameters()], 160) == [[0, 1, 2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    sizes = [0, 20] * 6  # of what is copied
    assert structure.groups(model, [*model.parameters()], 40, sizes) == [[0, 1, 2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert structure.groups(model, [*model.parameters()], 60, sizes) == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]


def test_groups_are_the_largest_parts_of_a_model_that_are_not_larger_than_said():
    model, _ = make("llama")
    names = {n: i for i, (n, _) in enumerate(model.named_parameters())}
    tensors = [*model.parameters(), torch.ones(3)]  # the last one is not the module's
    layer = [[i for n, i in names.items() if n.startswith(f"model.layers.{k}.")] for k in (0, 1)]
    nbytes = sum(tensors[i].nbytes for i in layer[0])
    assert all(group in structure.groups(model, tensors, nbytes) for group in layer)
    for most in (0, nbytes, 1 << 30):
        assert sorted(i for g in structure.groups(model, tensors, most) for i in g) == list(range(len(tensors)))
    assert structure.groups(model, tensors, 1 << 30) == [list(range(len(tensors) - 1)), [len(tensors) - 1]]


def test_an_embedding_perturbs_only_rows_looked_up(monkeypatch):
    model = nn.Sequential(nn.Embedding(1000, 8), nn.Linear(8, 1))
    opt = optimizer(model)
    for _ in range(2):
        opt.step(lambda: model(torch.tensor([[3, 999, 3]])).sum())
    assert opt.memory()["scratch"] < 1000
    with pytest.raises(IndexError, match=r"0\.weight"):
        opt.step(lambda: model(torch.tensor([[1000]])).sum())


@pytest.mark.parametrize("name", ["llama", "recurrent"])
def test_groups_that_a_probe_leaves_out_cost_nothing(monkeypatch, name):
    monkeypatch.setattr(structure, "GROUP", 0)
    (model, loss), (twin, twin_loss), probe = make(name), make(name), torch.tensor([6])
    opt, other, before = optimizer(model), optimizer(twin, "inplace"), bits(model)
    for c in (1e-2, -1e-2):  # the comparison is behind us when results differ
        at(opt, loss, c, probe)
    engine, count = opt._prepare(), len(before)
    seen = passes(monkeypatch, engine)
    for leave_out in (range(3, count), [0], range(count // 2, count // 2 + 2), range(count)):
        del seen[:]
        with torch.no_grad():
            got = engine.evaluate(loss, 1e-2, probe, leave_out)
            expected = other._prepare().evaluate(twin_loss, 1e-2, probe, leave_out)
            engine.restore(), other._prepare().restore()
        assert torch.allclose(got, expected, rtol=1e-5) and not any(set(which) <= set(leave_out) for which in seen)
        assert unchanged(model, before)
    assert torch.equal(got, loss())


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
