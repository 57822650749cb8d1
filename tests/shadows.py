"""What tests of the shadow engine share."""

import warnings

import torch
from torch import nn

import zo_core
from zo_core.engines import structure


def optimizer(model, engine="shadow", **options):
    """MeZO with a large eps and no residuals."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(read elsewhere|less than the spacing).*")
        return zo_core.MeZO(
            model, **{"lr": 1e-3, "eps": 1e-2, "seed": 3, "engine": engine, "residual": None, **options}
        )


def bits(model):
    """The parameters as they are now, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def unchanged(model, before):
    """Whether a module's parameters are parameters and have the bits they had."""
    assert all(type(p) is nn.Parameter for m in model.modules() for p in m._parameters.values() if p is not None)
    return all(torch.equal(p.view(torch.uint8), before[n].view(torch.uint8)) for n, p in model.named_parameters())


def at(opt, loss, c, probe):
    """The loss at theta + c z(probe)."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*read elsewhere.*")
        try:
            return opt._prepare().evaluate(loss, c, probe)
        finally:
            opt._prepare().restore()


def passes(monkeypatch, engine):
    """A list that gets the numbers of the tensors of each pass over copies."""
    seen, original = [], engine._perturb
    monkeypatch.setattr(
        engine, "_perturb", lambda make, which, *rest: (seen.append([*which]), original(make, which, *rest))
    )
    return seen


def steady(closure, model, **options):
    """An optimizer whose engine has seen what the closure reads, a probe, and the loss there."""
    opt, probe = optimizer(model, **options), torch.tensor([1])
    results = [at(opt, closure, 1e-2, probe) for _ in range(3)]
    assert torch.equal(results[0], results[-1])
    return opt, probe, results[0]


def layers(monkeypatch, n=6):
    """Linear layers, each perturbed by itself."""
    monkeypatch.setattr(structure, "GROUP", 32 * 33 * 4)
    return nn.ModuleList([nn.Linear(32, 32) for _ in range(n)])


def through(model, order):
    """A closure that reads layers in this order, whatever it is by then."""

    def closure():
        x = torch.ones(32)
        for i in order:
            x = model[i](x)
        return x.sum()

    return closure
