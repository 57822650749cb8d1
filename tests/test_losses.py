"""Losses in float32: torch's values, without the logits in float32. The loss for classification."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from zo_core import losses


class Largest(TorchDispatchMode):
    """The largest tensor in memory of its own that any operation returned."""

    def __init__(self, given):
        super().__init__()
        self.given, self.elements = given.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() != self.given:
                self.elements = max(self.elements, t.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_value_is_torch_s_in_float32(dtype, monkeypatch):
    monkeypatch.setattr(losses, "_BLOCK", 300)
    logits, labels = torch.randn(3, 11, 97).mul(4).to(dtype), torch.randint(0, 97, (3, 11))
    labels[0, :5] = -100
    expected = functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
    got = losses.cross_entropy(logits, labels)
    assert got.dtype == torch.float32 and torch.allclose(got, expected, rtol=1e-6)
    shifted = functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
    assert torch.allclose(losses.causal_lm_loss(logits, labels), shifted, rtol=1e-6)
    assert losses.cross_entropy(logits, torch.full_like(labels, -100)).isnan()


def test_no_second_copy_of_the_logits():
    logits, labels = torch.randn(8, 64, 50_000, dtype=torch.bfloat16), torch.randint(0, 50_000, (8, 64))
    with Largest(logits) as seen:
        losses.causal_lm_loss(logits, labels)
    assert seen.elements <= 1 << 22


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"targets: expected shape \(2, 3\)"):
        losses.cross_entropy(torch.zeros(2, 3, 5), torch.zeros(3, 2).long())


# ---- classification


@pytest.mark.parametrize("labels", [2, 3, 5])
def test_label_biases_make_the_cross_entropy_least(labels: int) -> None:
    draw = torch.Generator().manual_seed(labels)
    logits = 2 * torch.randn(3, 60, labels, generator=draw) + torch.arange(labels)
    wanted = torch.randint(labels, (60,), generator=draw)
    shares = torch.bincount(wanted, minlength=labels) / 60
    found = torch.vmap(lambda x: losses.label_biases(x, shares, rounds=200))(logits)  # as the grouped engine calls it
    for x, biases in zip(logits, found, strict=True):
        torch.testing.assert_close(biases, losses.label_biases(x, shares, rounds=200))
        torch.testing.assert_close((x + biases).softmax(-1).mean(0), shares)
        assert biases.mean().abs() < 1e-5
        moved = biases.clone().requires_grad_()
        functional.cross_entropy(x + moved, wanted).backward()
        assert moved.grad is not None and moved.grad.abs().max() < 1e-5


def test_label_biases_of_predictions_that_are_sure_are_finite() -> None:
    found = losses.label_biases(torch.tensor([[0.0, 300.0], [0.0, 310.0]]), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(found, torch.tensor([152.5, -152.5]), atol=5.0, rtol=0)


def test_label_shares_count_one_example_more_of_all_labels_alike() -> None:
    found = losses.label_shares(torch.tensor([0, 0, 2]), 3)
    torch.testing.assert_close(found, torch.tensor([7 / 12, 1 / 12, 4 / 12]))


@pytest.mark.parametrize("temperature", [1.0, 3.0, 1e3])
def test_the_gradient_of_a_label_loss_is_that_of_its_definition(temperature):
    """Along logits that are shifted by the same for all examples it is 0, as the biases follow; at 1e3 all examples weigh alike."""
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(8, 3, generator=draw).mul(4).requires_grad_(), torch.arange(8) % 3
    loss = losses.label_loss(logits, labels, temperature=temperature)
    (gradient,) = torch.autograd.grad(loss, logits)
    shares = (labels[:, None] == torch.arange(3)).float().mean(0)
    biases = losses.label_biases(logits.detach() / temperature, (8 * shares + 1 / 3) / 9)
    wanted = (logits.detach() / temperature + biases).softmax(-1) - functional.one_hot(labels)
    fixed = losses.label_loss(logits, labels, temperature=temperature, biases=temperature * biases)
    (known,) = torch.autograd.grad(fixed, logits)
    torch.testing.assert_close(known, wanted / 8, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(fixed, loss)
    assert gradient.sum(0).abs().max() < 0.01 < gradient.abs().max()
    if temperature > 100:
        assert (known.norm(dim=-1) / known.norm(dim=-1).mean() - 1).abs().max() < 0.2


def test_a_label_loss_of_16_bit_logits_is_in_float32_and_batched():
    logits, labels = torch.randn(5, 6, 2).bfloat16(), torch.tensor([0, 1] * 3)
    found = torch.vmap(lambda x: losses.label_loss(x, labels))(logits)  # as the grouped engine calls it
    expected = torch.stack([losses.label_loss(x.float(), labels) for x in logits])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    zeros = losses.label_loss(logits[0], labels, temperature=1.0, biases=torch.zeros(2))
    assert zeros == losses.cross_entropy(logits[0], labels)


def test_a_label_loss_refuses_what_it_cannot_take():
    for wrong in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"temperature: expected a finite number above 0, got {wrong}"):
            losses.label_loss(torch.zeros(2, 2), torch.tensor([0, 1]), temperature=wrong)
    with pytest.raises(ValueError, match="targets: expected shape"):
        losses.label_loss(torch.zeros(2, 2), torch.tensor([0, 1, 1]))
