"""Choosing a learning rate: the search itself, and sweeps of a tiny model."""

import json
import math
import shlex
from pathlib import Path

import pytest
import tiny_lm
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from zo_core.cli import app
from zo_core.integrations import session as sessions
from zo_core.integrations import sweep as sweeps
from zo_core.integrations.config import EARLIER, METHODS, FinetuneConfig, RunError, stored_config
from zo_core.integrations.finetune import finetune
from zo_core.integrations.session import prepare
from zo_core.integrations.sweep import behind, ladder, sweep


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("inputs")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"text": t, "label": v}) + "\n" for t, v in tiny_lm.rows(200)))
    model = str(tiny_lm.save(folder / "llama"))
    return {"model": model, "data": str(data), "autocast": False, "validation_size": 40, "test_size": 40, "steps": 8}


@given(best=st.floats(-4, 4), start=st.floats(-2, 2))
def test_a_ladder_finds_the_rung_nearest_the_minimum(best: float, start: float) -> None:
    tried = ladder(lambda x: abs(math.log10(x) - best), 10**start, most=30)
    found = min(tried, key=lambda x: tried[x])
    assert abs(math.log10(found) - best) < 0.27
    assert len(tried) <= 4 + 2 * abs(best - start)


def test_a_ladder_stops_at_its_last_try_and_minds_no_nan() -> None:
    assert len(ladder(lambda x: x, 1.0, most=5)) == 5
    assert min(ladder(lambda x: math.nan if x > 1 else -x, 1.0).items(), key=lambda item: item[1]) == (1.0, -1.0)


def test_behind_counts_paired_standard_errors() -> None:
    best = torch.randn(400, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(400, generator=torch.Generator().manual_seed(1))
    assert behind(best + 0.5 + 0.1 * noise, best) > 50
    assert abs(behind(best + 0.1 * noise, best)) < 4
    assert behind(best, best) == 0
    assert behind(best + math.nan, best) == math.inf


def test_a_sweep_finds_the_better_rates_goes_on_and_refuses_others(
    inputs: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FinetuneConfig(**inputs, method="mezo", probes=4, lr=1e-4, output=tmp_path)
    result = sweep(config)
    losses = {(t["lr"], t["eps"]): t["loss"] for t in result["trials"]}
    finished = [loss for loss in losses.values() if loss is not None]
    assert losses[result["lr"], result["eps"]] == result["loss"] == min(finished) < result["before"]
    assert len({eps for _, eps in losses}) >= 3
    assert (tmp_path / "sweep.png").stat().st_size > 1000
    made = []
    monkeypatch.setattr(sweeps.Sweep, "train", lambda *args: made.append(args))
    assert sweep(config)["lr"] == result["lr"]
    assert not made
    for change in ({"seed": 1}, {"lr": 1e-3}, {"autocast": True}):
        with pytest.raises(RunError, match=rf"other options \({next(iter(change))}\)"):
            sweep(config.model_copy(update=change))
    kept = json.loads((tmp_path / "sweep.json").read_text())
    kept["config"] = {name: value for name, value in kept["config"].items() if name not in EARLIER}
    (tmp_path / "sweep.json").write_text(json.dumps(kept))
    assert sweep(config.model_copy(update=EARLIER))["lr"] == result["lr"] and not made


def test_a_stopped_sweep_goes_on_as_if_nothing_had_happened(
    inputs: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the best trial, which stops others, was before the stop, and the timing of autocast changes its mind."""
    config = FinetuneConfig(**{**inputs, "autocast": None}, method="mezo", probes=4, lr=1e-2, output=tmp_path / "whole")
    monkeypatch.setattr(sessions, "_autocast_is_faster", lambda *args: False)
    whole = sweep(config, tries=4)["trials"]
    assert any(trial["end"].startswith("stopped") for trial in whole)
    parts, train, done = config.model_copy(update={"output": tmp_path / "parts"}), sweeps.Sweep.train, []

    def stopping(*args: object) -> object:
        done.append(args)
        if len(done) % 2 == 0:
            raise KeyboardInterrupt
        return train(*args)

    monkeypatch.setattr(sweeps.Sweep, "train", stopping)
    for count in range(1, len(whole)):
        with pytest.raises(KeyboardInterrupt):
            sweep(parts, tries=4)
        monkeypatch.setattr(sessions, "_autocast_is_faster", lambda *args: True)
        assert len(json.loads((tmp_path / "parts" / "sweep.json").read_text())["trials"]) == count
    assert sweep(parts, tries=4)["trials"] == whole


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"config": {}, "trials": [{}], "best": []}', '{"config', None])
def test_what_no_sweep_wrote_is_refused(inputs: dict[str, object], tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "sweep.json"
    path.mkdir() if content is None else path.write_text(content)
    with pytest.raises(RunError, match=r"sweep.json' is not what a sweep wrote"):
        sweep(FinetuneConfig(**inputs, output=tmp_path))
    if content is None:
        with pytest.raises(RunError, match="cannot be written"):
            sweep(FinetuneConfig(**inputs, output=tmp_path), overwrite=True)


def test_a_ladder_that_leaves_the_range_goes_on_without_the_value(inputs: dict[str, object], tmp_path: Path) -> None:
    config = FinetuneConfig(**{**inputs, "steps": 4}, method="mezo", eps=1e30, output=tmp_path)
    ends = [t["end"] for t in sweep(config, tries=3)["trials"]]
    assert "--method mezo: eps: expected a finite number from 1e-30 to 1e+30, got 3.2e+30" in ends


def test_hopeless_trials_are_stopped(inputs: dict[str, object], tmp_path: Path) -> None:
    plain = {"batch_size": 16, "label_bias": 0, "temperature": 1.0}
    config = FinetuneConfig(**{**inputs, "steps": 40}, method="mezo", probes=4, **plain, output=tmp_path)
    trials = sweeps.Sweep(prepare(config), sweeps.Console(quiet=True))
    assert trials.trial(2e-3, 1e-3) < math.inf
    assert trials.trial(0.1, 1e-3) == math.inf
    assert trials.kept.trials[1].end != "finished"
    assert len(trials.kept.trials[1].at_quarters) < 4


def test_the_command(inputs: dict[str, object], tmp_path: Path) -> None:
    given = [f"--{k.replace('_', '-')}={v}" for k, v in inputs.items() if k != "autocast"]
    command = [
        "sweep",
        *given,
        "--no-autocast",
        "--method=fzoo",
        "--probes=4",
        "--dropout",
        "--no-eps",
        "--tries=3",
        "--schedule=cosine",
        "--template",
        r"It's {text}\n:",
        "-o",
        str(tmp_path),
    ]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    suggested = next(line for line in result.output.splitlines() if "zo-core finetune --model" in line)
    kept = json.loads((tmp_path / "sweep.json").read_text())
    run = tmp_path / "the run"
    result = CliRunner().invoke(app, [*shlex.split(suggested)[1:], "-o", str(run)])
    assert result.exit_code == 0, result.output
    expected = {**kept["config"], "lr": kept["lr"], "eps": kept["eps"]}
    del expected["data_sha256"]
    assert stored_config(run).model_dump(mode="json", exclude={"output"}) == expected
    assert "Choose a learning rate" in CliRunner().invoke(app, ["sweep", "--help"]).output


# ---- methods on the command line -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_with_its_own_defaults(method: str, inputs: dict[str, object], tmp_path: Path) -> None:
    config = FinetuneConfig(**{**inputs, "steps": 2}, method=method, output=tmp_path / "run")
    assert config.lr == METHODS[method].defaults["lr"]
    assert FinetuneConfig(**inputs, method=method, lr=0.5).lr == 0.5
    summary = finetune(config)
    assert summary["steps"] == 2 and summary["skipped_steps"] == 0
    assert summary["method"] == method


def test_a_command_makes_the_run_it_was_made_of() -> None:
    assert (
        FinetuneConfig(method="fzoo", steps=5).command()
        == "zo-core finetune --method fzoo --lr 0.0025 --eps 0.001 --steps 5"
    )
    config = FinetuneConfig(labels={"1": " bad", "5": "= good"}, method="spsa", time_budget="2m", keep_best=False)
    assert config.command() == (
        "zo-core finetune --label '1= bad' --label '5== good' --method spsa --lr 0.0004 --eps 0.001 --time-budget 120.0 "
        "--no-keep-best"
    )


def test_an_option_of_another_method_is_refused() -> None:
    with pytest.raises(ValueError, match="smoothing is an option of hizoo, hizoo-l; mezo has none"):
        FinetuneConfig(method="mezo", smoothing=0.1)
    with pytest.raises(ValueError, match="alpha is an option of spsa"):
        FinetuneConfig(method="fzoo", alpha=0.1)
