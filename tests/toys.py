"""A small regression task that several test files train on."""

import torch
from torch import nn

X = torch.linspace(-1, 1, 64 * 6).view(64, 6).sin()
Y = X[:, :1] * X[:, 1:2] + X[:, 2:3]


def loss_of(model: nn.Module, part: int = 0, parts: int = 1):
    """The loss of a part of the batch, all of it by default, as a closure."""
    dtype, here = next(model.parameters()).dtype, slice(len(X) * part // parts, len(X) * (part + 1) // parts)
    return lambda: (model(X[here].to(dtype)).float() - Y[here]).square().mean()


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether the parameters of two modules have the same bits."""
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
