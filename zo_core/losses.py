"""Losses in float32 of 16-bit logits, without a second copy of the logits, and a loss for classification.

A projected gradient is the difference of two losses that agree in most of their digits: computed in bfloat16, the
losses have 8 bits, and their difference is mostly rounding (docs/precision.md).

A model that has not been trained for a task prefers some labels, whatever the text is. A bias for each label's logit, fitted to
examples, takes that away (Zhao et al., 2021, arXiv:2102.09690; Zhou et al., 2023, arXiv:2309.17249). A loss whose biases are
fitted to its own batch has no gradient along this preference, which otherwise most of a batch's noise is.
"""

import math

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


def label_loss(logits: Tensor, labels: Tensor, *, temperature: float = 1.0, biases: Tensor | None = None) -> Tensor:
    """Cross-entropy of classification for training with few forwards: at a temperature, with a bias for each label's logit.

    temperature * cross_entropy(logits / temperature + b, labels). The gradient along an example's logits is softmax(logits / temperature
    + b) - onehot(label): the higher the temperature, the less do examples whose labels the model finds unlikely, and which most of a batch's
    noise comes from, weigh more than others. Biases b that are fitted to the batch itself leave out what the model prefers whatever the
    example is (``label_biases``). docs/choosing-a-method.md has what both bring. Evaluate with plain cross-entropy or accuracy.

    Args:
        logits: (examples, labels), those of the label tokens for a model that is prompted; of any floating dtype.
        labels: int64 (examples,), their indices; a batch should have several examples of each label.
        temperature: above 0; 1 is plain cross-entropy. Above 1, logits grow too large to give right probabilities in a long run, in
            the end by more than its factor; which label is the likeliest does not suffer by that.
        biases: float32 (labels,), known ones in place of those that are fitted to the batch; zeros: none.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: the shapes do not fit, or the temperature is not finite and above 0.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")
    logits = logits.float() / temperature
    if biases is None:
        biases = label_biases(logits, label_shares(labels, logits.shape[-1]))
    else:
        biases = biases / temperature
    return temperature * cross_entropy(logits + biases, labels)


def label_biases(logits: Tensor, shares: Tensor, rounds: int = 10) -> Tensor:
    """Biases with which the mean probability of each label over examples is its share; float32 (labels,), of mean 0.

    Where the shares are the labels' own, these biases make the cross-entropy of the examples least. They are found by fixed-point
    iteration, b += log(shares) - log(mean softmax(logits + b)), which works under ``torch.vmap``.

    Args:
        logits: float32 (examples, labels).
        shares: float32 (labels,), positive, of sum 1.
        rounds: iterations. The surer the predictions are, the more of the distance each leaves.
    """
    biases = torch.zeros_like(shares)
    wanted = shares.log() + math.log(len(logits))  # logarithms of sums of probabilities over the examples
    for _ in range(rounds):
        biases = biases + wanted - (logits + biases).log_softmax(-1).logsumexp(0)
    return biases - biases.mean()


def label_shares(labels: Tensor, n: int) -> Tensor:
    """The share of each of n labels among int64 labels, as if there were one more example, of all labels alike; float32 (n,)."""
    counts = (labels[:, None] == torch.arange(n, device=labels.device)).float().sum(0)
    return (counts + 1 / n) / (len(labels) + 1)
