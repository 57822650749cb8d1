"""Losses in float32: torch's values, without the logits in float32."""

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
