"""Runs that an earlier version of the library saved in tests/data, and how they were made.

The weights are simple fractions and the loss is a sum in Python's floats, so that a run is the same on all machines whose
backend makes the same noise. ``python tests/saved_runs.py`` makes the files anew; that is only right after a change
of a file format that is meant to break old files.
"""

import math
import sys
from pathlib import Path

import torch
from torch import nn

import zo_core

DATA = Path(__file__).parent / "data"
SAVED_AT, STEPS = 6, 10
SMALL = {"eps": 0.125, "lr": 1e-2}  # for 16-bit weights
RUNS = {  # name: method, dtype, options
    "mezo_float32": ("MeZO", torch.float32, {"lr": 1e-2, "eps": 1e-2, "probes": 2, "weight_decay": 0.1}),
    "mezo_bfloat16": ("MeZO", torch.bfloat16, {**SMALL, "distribution": "rademacher", "weight_decay": 0.1}),
    "mezo_in_place": ("MeZO", torch.float32, {"lr": 1e-2, "eps": 1e-2, "engine": "inplace"}),
    "lezo_float16": ("LeZO", torch.float16, {**SMALL, "rho": 0.5, "residual": None}),
    "fzoo_reuse_bfloat16": (
        "FZOO",
        torch.bfloat16,
        {**SMALL, "distribution": "rademacher", "probes": 3, "reuse": True},
    ),
    "spsa_float16": ("SPSA", torch.float16, {**SMALL, "probes": 3, "residual": 16}),
    "hizoo_float32": ("HiZOO", torch.float32, {"lr": 1e-2, "eps": 1e-2, "smoothing": 1e-2, "weight_decay": 0.1}),
    "hizoo_factored_bfloat16": ("HiZOO", torch.bfloat16, {**SMALL, "smoothing": 1e-2, "hessian": "factored"}),
}


class Toy(nn.Module):
    """Three blocks of a matrix and a vector."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(7, 5) for _ in range(3)).to(dtype)
        for i, p in enumerate(self.parameters()):
            p.data.copy_(((torch.arange(p.numel()) * 37 + 11 * i) % 64 / 64 - 0.5).view(p.shape))

    def forward(self) -> float:
        values = [p.flatten()[::3].double().tolist() for p in self.parameters()]
        return math.fsum((x - 0.01 * i) ** 2 for i, x in enumerate(x for row in values for x in row))


def optimizer_of(name: str, model: nn.Module) -> zo_core.ZOOptimizer:
    method, _, options = RUNS[name]
    return getattr(zo_core, method)(model, seed=2**63 + 5, **options)


def go_on(model: nn.Module, opt: zo_core.ZOOptimizer, first: int, last: int) -> None:
    """Steps of a run; the third has a loss that is not a number."""
    for step in range(first, last):
        opt.param_groups[0]["lr"] = 1e-2 / (1 + step / 8)
        opt.step(model if step != 2 else lambda: math.nan)


def make(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name, (_, dtype, _) in RUNS.items():
        model = Toy(dtype)
        opt = optimizer_of(name, model)
        (folder / f"{name}.zoj").unlink(missing_ok=True)
        opt.journal = zo_core.Journal.create(folder / f"{name}.zoj", opt)
        go_on(model, opt, 0, SAVED_AT)
        saved = {"model": model.state_dict(), "optimizer": opt.state_dict()}
        torch.save(saved, folder / f"{name}.pt")  # before its tensors move on
        go_on(model, opt, SAVED_AT, STEPS)
        opt.journal.close()
        saved |= torch.load(folder / f"{name}.pt") | {"end": model.state_dict()}
        torch.save(saved, folder / f"{name}.pt")


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else DATA)
