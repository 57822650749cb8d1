"""A whole MeZO step on a real model: ours, the published way, and the two forwards that both need.

SmolLM2-135M (from its PyPI package, or any folder or hub id with --model) on 16 movie-review prompts of 32 tokens.
"Outside" is what a step spends beside its forwards: noise, perturbing, restoring, updating, bookkeeping.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from zo_core.kernels import reference

import zo_core
from zo_core.integrations.config import FinetuneConfig
from zo_core.integrations.session import prepare
from zo_core.integrations.tasks import Encoded, collate

from . import published
from .harness import console, interleaved, quantiles, ratio, report


class Timed:
    """A closure that adds up the seconds it took."""

    def __init__(self, closure: Callable[[], Tensor]) -> None:
        self.closure, self.seconds = closure, 0.0

    def __call__(self) -> Tensor:
        """The loss."""
        start = time.perf_counter()
        loss = self.closure()
        self.seconds += time.perf_counter() - start
        return loss


def workload(model: str, dtype: Any, batch: int, length: int) -> tuple[torch.nn.Module, Callable[[], Tensor]]:
    """The model and its loss on `batch` prompts of exactly `length` tokens."""
    session = prepare(FinetuneConfig(model=model, dtype=dtype, autocast=False), console.log)
    long = [e for e in session.parts["train"] if len(e.tokens) >= length][:batch]
    if len(long) < batch:
        raise SystemExit(f"--length {length}: expected {batch} prompts of so many tokens, found {len(long)}")
    examples = collate([Encoded(e.tokens[-length:], *e[1:]) for e in long])
    return session.model, torch.no_grad()(lambda: session.scorer.loss(examples))


def gate(model: torch.nn.Module, loss: Callable[[], Tensor]) -> None:
    """One float32 step must be theta - lr g z, with z from the reference and g from the losses it saw."""
    model.float()
    parameters = dict(model.named_parameters())
    watched = {i: name for i, name in enumerate(parameters) if parameters[name].numel() < 1 << 20}
    watched = dict(list(watched.items())[:3])
    before = {name: parameters[name].detach().clone() for name in watched.values()}
    seen: list[float] = []
    lr, eps, seed = 1e-3, 1e-3, 5

    def watching() -> float:
        seen.append(float(loss()))
        return seen[-1]

    zo_core.MeZO(model, lr=lr, eps=eps, seed=seed).step(watching)
    g = (seen[0] - seen[1]) / (2 * eps)
    for i, name in watched.items():
        z = reference.gaussian(torch.arange(before[name].numel()), tensor_id=i, stream=0, seed=seed).view_as(
            before[name]
        )
        error = float((parameters[name] - (before[name] - lr * g * z)).abs().max())
        if not error < 1e-5:
            raise SystemExit(f"correctness gate: {name} is off by {error} after a step; no figure is given")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="registry name, folder or hub id (default smollm2)")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=32, help="tokens a prompt")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds, after one that is not counted")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    model, loss = workload(args.model, args.dtype, args.batch, args.length)
    gate(model, loss)
    console.print("correctness gate passed")
    model.to(getattr(torch, args.dtype))

    closures = {name: Timed(loss) for name in ("published MeZO", "zo_core gaussian", "zo_core rademacher")}
    params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    optimizers = {
        d: zo_core.MeZO(model, lr=1e-9, distribution=d) for d in reference.DISTRIBUTIONS
    }  # so small that the weights stay where they are
    tasks: dict[str, Callable[[], object]] = {
        "two forwards": lambda: (loss(), loss()),
        "published MeZO": lambda: published.mezo_step(params, closures["published MeZO"], 0, 1e-9, 1e-3),
    }
    for d, opt in optimizers.items():
        tasks[f"zo_core {d}"] = partial(opt.step, closures[f"zo_core {d}"])
    inside: dict[str, list[float]] = {name: [] for name in closures}

    def recorded(name: str, task: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            closures[name].seconds = 0.0
            task()
            inside[name].append(closures[name].seconds)

        return run if name in closures else task

    seconds = interleaved({name: recorded(name, task) for name, task in tasks.items()}, args.rounds, "steps")
    rows, result = [], {}
    forwards = {name: inside[name][1:] if name in inside else seconds[name] for name in tasks}
    outside = {name: [a - b for a, b in zip(seconds[name], forwards[name], strict=True)] for name in tasks}
    for name, times in seconds.items():
        ours = name.startswith("zo_core")
        result[name] = {
            k: quantiles(v) for k, v in (("step", times), ("forwards", forwards[name]), ("outside", outside[name]))
        }
        if ours:
            result[name] |= {
                "times_faster": ratio(seconds["published MeZO"], times),
                "times_less_outside": ratio(outside["published MeZO"], outside[name]),
                "forwards_over_plain": ratio(forwards[name], seconds["two forwards"]),
            }
        q = result[name]
        rows.append(
            [name, *(f"{q[k]['median'] * 1e3:,.0f}" for k in ("step", "forwards", "outside")),
             *((f"{q[k]['median']:.2f}x" if ours else "") for k in ("times_faster", "times_less_outside", "forwards_over_plain"))]
        )  # fmt: skip
    count = sum(p.numel() for p in params)
    report(
        f"A MeZO step, {args.model} {args.dtype}, {count:,} weights, {args.batch} x {args.length} tokens (medians)",
        ["", "step ms", "forwards ms", "outside ms", "step vs published", "outside vs published", "forwards vs plain"],
        rows, {"weights": count, "batch": args.batch, "length": args.length, "dtype": args.dtype, "steps": result}, args.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
