"""What the gradients of single sentences say about a loss for classification with two labels, before any training.

The gradient of each sentence's margin (the difference of the labels' logits), by backpropagation, is projected on some numbers for each
kind of tensor by a count sketch (Charikar et al., 2002), which keeps inner products. The gradient of a loss is a sum of them, its
coefficients r follow from the logits, and biases that are fitted take the mean (weighted by p (1 - p)) out of all of them. So one pass over the
sentences compares losses:

    signal     |g|^2, the squared norm of the mean gradient over all sentences, without the bias that one sentence has with itself
    noise      E |g_i - g|^2 of one sentence, over |g|^2
    along      the cosine of g with the gradient of cross-entropy, which is what shall fall
    progress   of a step of zeroth order at its best rate, in terms of cross-entropy, for each forward of one example, from
               <g, g_CE>^2 / (|g|^2 + noise / (B - 1)) / B with B examples a batch, of which the biases cost one;
               relative to cross-entropy with 16 examples a batch

By kind of tensor, at --temperature, the same with the trace of the Gauss-Newton matrix of cross-entropy: the progress of steps along these
tensors alone, relative to all, <g, g_CE>^2 / ((|g|^2 + noise / (B - 1)) trace).

By length, at --temperature: steps on the sentences with the shortest prompts alone, whose gradient is g, while cross-entropy of all sentences
shall fall. Progress, with 8 a batch, is relative to that with all sentences, for each forward of one example and for each token.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track

import zo_core
from zo_core import losses
from zo_core.integrations.config import EARLIER, FinetuneConfig
from zo_core.integrations.session import Session, prepare

from .harness import console, report
from .methods import without_long

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
TEMPERATURES = (1.0, 2.0, 3.0, 5.0, 10.0, 100.0)
BATCHES = (2, 4, 8, 16)
SHARES = (0.25, 0.4, 0.55, 0.75, 1.0)


def sketches(session: Session, n: int, width: int) -> tuple[dict[str, Array], Array, Ints]:
    """Gram matrices (n, n) of the margins' gradients for each kind of tensor; margins (n,) and labels (n,) of the sentences."""
    model, scorer = session.model, session.scorer
    kind_of = zo_core.scales.kinds(model)
    params = list(model.parameters())
    kinds = dict.fromkeys(kind_of.values())
    draw = torch.Generator().manual_seed(0)
    signs = [
        torch.randint(0, 2, (-(-p.numel() // width) * width,), generator=draw, dtype=torch.int8) * 2 - 1 for p in params
    ]
    shifts = [int(torch.randint(0, width, (1,), generator=draw)) for _ in params]
    found = {kind: np.zeros((n, width), np.float32) for kind in kinds}
    margins, labels = np.zeros(n), np.zeros(n, np.int64)
    for i, example in enumerate(track(session.parts["train"][:n], "gradients", console=console, transient=True)):
        logits = scorer.logits(scorer.batch([example]))[0]
        margin = logits[1] - logits[0]
        margins[i], labels[i] = float(margin.detach()), example.label
        gradients = torch.autograd.grad(margin, params)
        for kind, gradient, sign, shift in zip(kind_of.values(), gradients, signs, shifts, strict=True):
            padded = torch.nn.functional.pad(gradient.flatten(), (0, len(sign) - gradient.numel()))
            found[kind][i] += (padded * sign).view(-1, width).sum(0).roll(shift).numpy()
    return {kind: (x @ x.T).astype(np.float64) for kind, x in found.items()}, margins, labels


class Margins:
    """What follows from the Gram matrix of margins' gradients and the coefficients of a loss."""

    def __init__(self, gram: Array, margins: Array, labels: Ints) -> None:
        self.margins, self.labels = margins, labels
        p = self.likely(1.0)
        self.curvature = p * (1 - p)
        weights = self.curvature / self.curvature.sum()
        mean = gram @ weights
        self.gram = gram - mean[:, None] - mean[None] + weights @ mean
        self.plain = p - labels

    def likely(self, temperature: float) -> Array:
        """The probability of the second label with a fitted bias, at a temperature."""
        logits = torch.from_numpy(np.stack((np.zeros_like(self.margins), self.margins), -1) / temperature)
        shares = torch.from_numpy(np.bincount(self.labels, minlength=2) / len(self.labels))
        biases = losses.label_biases(logits, shares, rounds=200)
        return np.asarray((logits + biases).softmax(-1)[:, 1])

    def figures(self, r: Array, taken: Mask | None = None) -> dict[str, float]:
        """Of a loss whose gradient is the mean of r_i times that of margin i, over all sentences or those that are ``taken``."""
        taken = np.ones(len(r), bool) if taken is None else taken
        n, k, r = len(r), float(taken.sum()), r * taken

        def common(a: Array, b: Array, pairs: float) -> float:
            """<E a_i g_i, E b_i g_i> from so many pairs of different sentences."""
            return float((a @ self.gram @ b - (a * b * np.diag(self.gram)).sum()) / pairs)

        signal, along = common(r, r, k * (k - 1)), common(r, self.plain, k * (n - 1))
        return {
            "signal": signal, "noise": float((r * r * np.diag(self.gram)).sum() / k) - signal, "along": along,
            "of_ce": common(self.plain, self.plain, n * (n - 1)), "trace": float((self.curvature * np.diag(self.gram)).mean()),
        }  # fmt: skip

    def at(self, temperature: float, taken: Mask | None = None) -> dict[str, float]:
        """The figures of cross-entropy at a temperature."""
        return self.figures(self.likely(temperature) - self.labels, taken)


def progress(x: dict[str, float], batch: int) -> float:
    """Of a step of a batch, but for a factor that losses share."""
    return x["along"] ** 2 / (x["signal"] + x["noise"] / (batch - 1))


def by_length(whole: Margins, lengths: Ints, temperature: float) -> dict[str, dict[str, float]]:
    """The figures of the shortest sentences, by their share; print the table."""
    found, rows = dict[str, dict[str, float]](), list[list[str]]()
    x, ordered = whole.at(temperature), np.sort(lengths)
    for share in SHARES:
        taken = lengths <= ordered[math.ceil(share * len(lengths)) - 1]
        part, tokens = whole.at(temperature, taken), float(lengths[taken].mean())
        gain = progress(part, 8) / progress(x, 8)
        part |= {"tokens": tokens, "progress": gain, "per_token": gain * float(lengths.mean()) / tokens}
        found[f"{share:g}"] = part
        rows.append(
            [
                f"{share:g}", f"{lengths[taken].max()}", f"{tokens:.1f}", f"{part['along'] / x['along']:.2f}",
                f"{part['noise'] / part['signal']:.1f}", f"{gain:.2f}", f"{part['per_token']:.2f}",
            ]
        )  # fmt: skip
    columns = ["share", "longest", "mean tokens", "along, relative", "noise", "progress a forward", "a token"]
    report(f"shortest sentences at temperature {temperature:g}", columns, rows)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="reviews")
    parser.add_argument("--sentences", type=int, default=512)
    parser.add_argument("--longest", type=int, default=32, help="tokens of a prompt; longer ones are left out")
    parser.add_argument("--width", type=int, default=1 << 18, help="numbers of a sketch")
    parser.add_argument("--temperature", type=float, default=10.0, help="of the tables by kind and length")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    config = FinetuneConfig(model=args.model, data=args.data, autocast=False, **EARLIER)
    session = without_long(prepare(config, lambda text: console.print(text, style="dim")), args.longest)
    by_kind, margins, labels = sketches(session, min(args.sentences, len(session.parts["train"])), args.width)
    lengths = np.array([len(example.tokens) for example in session.parts["train"][: len(labels)]])
    whole = Margins(np.sum(list(by_kind.values()), axis=0), margins, labels)

    if whole.at(1.0)["signal"] <= 0:
        raise SystemExit(
            f"--sentences {args.sentences}: too few to tell the gradient from their noise; give some hundred"
        )
    base, rows, found = progress(whole.at(1.0), 16) / 16, list[list[str]](), dict[str, Any]()
    for t in TEMPERATURES:
        x = whole.at(t)
        gains = {b: progress(x, b) / b / base for b in BATCHES}
        cosine = x["along"] / (x["signal"] * x["of_ce"]) ** 0.5
        found[f"{t:g}"] = {**x, "progress": gains}
        rows.append(
            [
                f"{t:g}",
                f"{x['signal']:.1f}",
                f"{x['noise'] / x['signal']:.1f}",
                f"{cosine:.3f}",
                *(f"{g:.2f}" for g in gains.values()),
            ]
        )
    columns = ["temperature", "signal", "noise", "along", *(f"progress, {b} a batch" for b in BATCHES)]
    report(f"losses of {len(labels)} sentences, relative to cross-entropy with 16 a batch", columns, rows)

    kinds = {kind: Margins(gram, margins, labels).at(args.temperature) for kind, gram in by_kind.items()}
    x = whole.at(args.temperature)
    all_of = progress(x, 8) / x["trace"]
    rows = [
        [
            kind, f"{100 * k['signal'] / x['signal']:.1f}", f"{100 * k['trace'] / x['trace']:.1f}", f"{k['noise'] / k['signal']:.1f}",
            f"{progress(k, 8) / k['trace'] / all_of:.2f}",
        ]
        for kind, k in kinds.items()
    ]  # fmt: skip
    columns = ["kind", "% of the signal", "% of the trace", "noise", "progress alone, 8 a batch"]
    result = {
        "sentences": len(labels), "losses": found, "kinds": kinds, "temperature": args.temperature,
        "lengths": by_length(whole, lengths, args.temperature),
    }  # fmt: skip
    report(f"kinds of tensors at temperature {args.temperature:g}", columns, rows, result, args.json)


if __name__ == "__main__":
    main()
