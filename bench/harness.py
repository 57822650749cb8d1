"""What the benchmarks share: the machine's description, interleaved timing, the table and the JSON."""

import json
import platform
import random
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import zo_core
from zo_core.integrations import report as report_of_run
from zo_core.integrations.files import atomic

console = Console(width=None if sys.stdout.isatty() else 160)


def machine() -> dict[str, Any]:
    """Where and with what the figures were made."""
    return {
        "processor": report_of_run.machine()["cpu"],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "zo_core": zo_core.__version__,
        "backend": zo_core.backend_info(),
        "command": " ".join(["python -m", f"bench.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
    }


def interleaved(tasks: Mapping[str, Callable[[], object]], rounds: int, title: str) -> dict[str, list[float]]:
    """Seconds of each task in each round; all tasks once a round, in changing order, after a round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for r in track(range(rounds + 1), description=title, console=console, transient=True):
        for name in random.Random(r).sample(list(tasks), len(tasks)):
            start = time.perf_counter()
            tasks[name]()
            if r:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def quantiles(values: list[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile."""
    low, middle, high = (
        torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    )
    return {"p20": low, "median": middle, "p80": high}


def ratio(baseline: list[float], ours: list[float]) -> dict[str, float]:
    """Percentiles of baseline over ours, round by round."""
    return quantiles([b / o for b, o in zip(baseline, ours, strict=True)])


def load(path: Path) -> dict[str, Any]:
    """What is in a JSON so far."""
    return json.loads(path.read_text()) if path.exists() else {}


def keep(path: Path, **values: Any) -> None:
    """Put values into a JSON, all of them or nothing; what else is there stays. Of a list each element is a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, value in {**load(path), **values}.items():
        rows = ",\n  ".join(map(json.dumps, value)) if isinstance(value, list) else None
        lines.append(f" {json.dumps(name)}: " + (f"[\n  {rows}\n ]" if rows else json.dumps(value, indent=1)))
    with atomic(path) as file:
        file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())


def report(
    title: str,
    columns: list[str],
    rows: list[list[str]],
    result: dict[str, Any] | None = None,
    path: Path | None = None,
) -> None:
    """Print the table; with a path write the result, with the machine, as JSON."""
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    about = machine()
    console.print(
        f"{about['processor']}, {torch.get_num_threads()} threads, torch {torch.__version__}, backend {about['backend']}"
    )
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": about, **(result or {})}, indent=1) + "\n")
        console.print(f"written to {path}")
