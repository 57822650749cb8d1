"""Losses in float32 of 16-bit logits, without a second copy of the logits.

A projected gradient is the difference of two losses that agree in most of their digits: computed in bfloat16, the
losses have 8 bits, and their difference is mostly rounding (docs/precision.md).
"""

import torch
from torch import Tensor
from torch.nn import functional

_BLOCK = 1 << 22  # logits that are in float32 at a time: 16 MiB


def cross_entropy(logits: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Mean cross-entropy over the last dimension, in float32.

    Args:
        logits: (..., classes), of any floating dtype.
        targets: int64 (...), classes; those that are ``ignore_index`` do not count.
        ignore_index: as in ``torch.nn.functional.cross_entropy``.

    Returns:
        A float32 scalar; not a number if no target counts.

    Raises:
        ValueError: the shapes do not fit.
    """
    if logits.dim() < 1 or logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets: expected shape {tuple(logits.shape[:-1])} for logits of shape {tuple(logits.shape)}, "
            f"got {tuple(targets.shape)}"
        )
    rows, wanted = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    blocks = max(1, _BLOCK // max(1, logits.shape[-1]))
    losses = [
        functional.cross_entropy(block.float(), t, ignore_index=ignore_index, reduction="sum")
        for block, t in zip(torch.split(rows, blocks), torch.split(wanted, blocks), strict=True)
    ]
    return torch.stack(losses).sum() / (wanted != ignore_index).sum()


def causal_lm_loss(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Mean cross-entropy of each next token, in float32.

    Args:
        logits: (batch, length, vocabulary), as a causal language model returns them for its input.
        labels: int64 (batch, length), the input tokens; those that are ``ignore_index`` do not count.
        ignore_index: as in ``cross_entropy``.
    """
    # Padding the labels takes no memory; leaving out the last logits would copy all others.
    following = functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
    return cross_entropy(logits, following, ignore_index=ignore_index)
