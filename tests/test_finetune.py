"""The run: what it writes, and that stopping it in any way changes nothing."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_lm
import torch
from pydantic import ValidationError
from rich.console import Console
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from zo_core import JournalError, calibration, scales
from zo_core.integrations import finetune as runs
from zo_core.integrations import tasks
from zo_core.integrations.config import FinetuneConfig, RunError, resumed_config
from zo_core.integrations.files import own_folder
from zo_core.integrations.finetune import RunInterrupted, finetune
from zo_core.integrations.replay import replay_model
from zo_core.integrations.session import prepare
from zo_core.integrations.sweep import sweep
from zo_core.locks import lock


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Steps of a tiny model take milliseconds; two threads that wait for each other on a busy machine do not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Options of a small run: a tiny Llama, 300 rows that one word decides."""
    folder = tmp_path_factory.mktemp("inputs")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"text": t, "label": v}) + "\n" for t, v in tiny_lm.rows(300)))
    options = {
        "model": str(tiny_lm.save(folder / "llama")),
        "data": str(data),
        "autocast": False,
        "method": "mezo",
        "schedule": "constant",
    }
    return {**options, "lr": 1e-3, "eval_every": 10, "validation_size": 50, "test_size": 60, "steps": 25}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in runs.read_metrics(folder) if line["kind"] == "step"]


def environment() -> dict[str, str]:
    """That of a process which imports this checkout."""
    path = os.pathsep.join([str(Path(runs.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


LIMITED = """
import resource, sys
from zo_core.cli import app
for limit in sys.argv[1].split(","):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    try:
        app(sys.argv[2:])
    except SystemExit as end:
        code = end.code
    print("exit code", code)
sys.exit(code)
"""
KILLED = """
import os, signal, sys
from pathlib import Path
from zo_core.integrations.files import own_folder
with own_folder(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def start(
    inputs: dict[str, object], folder: Path, *, resume: bool = False, limits: str = "1000000000000", **options: object
) -> "subprocess.Popen[str]":
    """The command in a process of its own, once for each limit of so many bytes a file."""
    command = [sys.executable, "-c", LIMITED, limits, "finetune", "--output", str(folder), *["--resume"] * resume]
    for name, value in (options if resume else {**inputs, **options}).items():
        flag = name.replace("_", "-")
        command += [f"--no-{flag}" if value is False else f"--{flag}={value}"]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


# ---- a whole run


@pytest.mark.parametrize("method", ["meazo", "bszo"])
def test_a_run_tells_how_many_differences_are_below_the_forwards_rounding(inputs, tmp_path, method):
    options = {**inputs, "method": method, "steps": 3, "lr": 1e-4}
    summary = runs.finetune(FinetuneConfig(**options, output=tmp_path / "one"))
    lines = [line for line in runs.read_metrics(tmp_path / "one") if line["kind"] == "step"]
    assert [(line["below_floor"], line["flat"]) for line in lines] == [(0.0, False)] * 3  # float32
    assert 0 < summary["floor"]["error"] < 1e-5 and summary["floor"]["below"] == 0 and summary["flat_steps"] == 0
    assert summary["forwards"] == 3 * (2 if method == "meazo" else 3)  # those of the steps
    runs.finetune(FinetuneConfig(**options, measure_floor=False, output=tmp_path / "other"))
    assert same(tmp_path / "one", tmp_path / "other")  # measuring changes no bit of a run
    assert "below_floor" not in runs.read_metrics(tmp_path / "other")[-2]


def test_a_run_with_a_floor_resumes_with_it(inputs, tmp_path):
    options = {**inputs, "steps": 2, "lr": 1e-4, "eps": 1e-6}
    first = runs.finetune(FinetuneConfig(**options, output=tmp_path))["floor"]
    again = runs.finetune(FinetuneConfig(**{**options, "steps": 4}, output=tmp_path), resume=True)
    lines = [line for line in runs.read_metrics(tmp_path) if line["kind"] == "step"]
    assert again["floor"]["error"] == first["error"] and len(lines) == 4
    assert again["flat_steps"] == sum(line["flat"] for line in lines)


def test_probes_with_batches_of_their_own_take_the_examples_in_order_and_resume(
    inputs: dict[str, object], tmp_path: Path
) -> None:
    inputs = {**inputs, "group_by_length": False}
    options = {**inputs, "spread": True, "probes": 3, "batch_size": 4, "keep_best": False}
    whole = FinetuneConfig(**{**options, "steps": 6, "output": tmp_path / "whole"})
    session, plain = prepare(whole), prepare(FinetuneConfig(**{**inputs, "batch_size": 12}))
    rows = [row for k in range(3) for row in session.batch_of(3 + k)[0].tolist()]
    together = plain.batch_of(1)[0].tolist()
    assert [r[-8:] for r in rows] == [r[-8:] for r in together]
    assert [float(f()) for f in session.closures_of(1)] == [float(session.loss_of(3 + k)()) for k in range(3)]
    assert finetune(whole)["forwards"] == 6 * 3 * 2  # those of the steps alone
    part = FinetuneConfig(**{**options, "steps": 3, "output": tmp_path / "part"})
    finetune(part)
    finetune(resumed_config(part.output, {"steps": 6}), resume=True)
    assert same(whole.output, part.output) and losses(whole.output) == losses(part.output)
    assert "--spread" in whole.command() and "--spread" not in plain.config.command()


def test_a_run_measures_its_scales_once_and_goes_on_with_no_others(
    inputs: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = calibration._measure

    def positive(*args: Any) -> Any:
        """A random model's traces are negative, which leaves all scales at 1."""
        return (found := measure(*args))._replace(curvatures=found.curvatures.abs())

    monkeypatch.setattr(calibration, "_measure", positive)
    options = {**inputs, "keep_best": False, "eval_every": 100, "test_size": 8, "validation_size": 8}
    whole = FinetuneConfig(**{**options, "calibrate": 34, "steps": 4, "output": tmp_path / "whole"})
    assert finetune(whole)["forwards"] == 34 + 4 * 2
    part = FinetuneConfig(**{**options, "calibrate": 34, "steps": 2, "output": tmp_path / "part"})
    finetune(part)
    finetune(resumed_config(part.output, {"steps": 4}), resume=True)
    assert same(whole.output, part.output) and losses(whole.output) == losses(part.output)
    replay_model(str(inputs["model"]), whole.output, tmp_path / "again" / "model")
    assert same(whole.output, tmp_path / "again")
    path = tmp_path / "scales.json"
    shutil.copy(whole.output / "scales.json", path)
    found = scales.load(path)
    assert len(set(found.values())) > 2
    given = FinetuneConfig(**{**options, "scales": path, "steps": 4, "output": tmp_path / "given"})
    finetune(given)
    assert same(whole.output, given.output) and f"--scales {path}" in given.command()
    scales.save({**found, next(iter(found)): 3.0}, path)
    with pytest.raises(RunError, match="scales: expected .* for model.embed_tokens.weight"):
        finetune(resumed_config(given.output, {"steps": 5}), resume=True)
    with pytest.raises(ValidationError, match="scales and calibrate exclude each other"):
        FinetuneConfig(**{**options, "scales": path, "calibrate": 34})
    path.unlink()
    with pytest.raises(RunError, match=r"--method mezo: .*scales\.json"):
        given.optimizer(prepare(given).model)


@pytest.fixture(scope="module")
def finished(inputs: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    options = {**inputs, "lr": 2e-3, "probes": 4, "schedule": "linear", "steps": 300, "eval_every": 50}
    finetune(FinetuneConfig(**options, temperature=2.0, output=folder))
    return folder


def test_a_run_learns_and_its_model_is_plain(finished: Path, inputs: dict[str, object]) -> None:
    """The accuracy in summary.json is what plain transformers computes, prompt by prompt, from model/ and the label biases."""
    summary = json.loads((finished / "summary.json").read_text())
    biases = torch.tensor([summary["label_bias"][label] for label in ("negative", "positive")])
    assert biases.abs().min() > 0.01
    model = AutoModelForCausalLM.from_pretrained(finished / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    examples = tasks.read_examples(Path(str(inputs["data"])))
    test = tasks.split_examples(examples, validation=50, test=60, seed=0).test
    words = [tokenizer(word).input_ids[0] for word in (" negative", " positive")]
    right = 0
    for example in test:
        prompt = torch.tensor([tokenizer(f"Review: {example.text}\nSentiment:").input_ids])
        scores = model(prompt).logits[0, -1, words] + biases
        options = {"max_new_tokens": 1, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
        generated = model.generate(prompt, **options).scores[0][0, words]  # which has them in its generation config
        torch.testing.assert_close(generated, scores)
        right += ["negative", "positive"][scores.argmax()] == example.label
    after, before = summary["test"]["after"], summary["test"]["before"]
    assert after["accuracy"] == pytest.approx(right / 60)
    assert after["accuracy"] > 0.85 > before["interval"][1]
    assert summary["test"]["change"]["difference"] == pytest.approx(after["accuracy"] - before["accuracy"])
    assert summary["test"]["change"]["interval"][0] > 0
    assert before["loss"] > summary["test"]["biases_alone"]["loss"] > after["loss"]
    assert summary["train_loss"]["first"] == pytest.approx(2 * math.log(2), abs=0.2)  # the temperature's
    assert summary["train_loss"]["last"] < summary["train_loss"]["first"] - 0.5


def test_what_a_run_writes(finished: Path) -> None:
    written = {*runs.OUR_FILES, ".lock"} - {"scales.json"}  # of runs with scales
    assert {path.name for path in finished.iterdir()} == written
    assert (finished / "plot.png").read_bytes().startswith(b"\x89PNG")
    summary, lines = json.loads((finished / "summary.json").read_text()), runs.read_metrics(finished)
    steps = [line for line in lines if line["kind"] == "step"]
    validations = [line for line in lines if line.get("split") == "validation"]
    assert [line["step"] for line in steps] == list(range(1, 301))
    assert [line["step"] for line in validations] == list(range(0, 301, 50))
    assert steps[-1]["forwards"] == summary["forwards"] == 300 * 4 * 2
    assert steps[0]["lr"] == 2e-3
    assert steps[-1]["lr"] == pytest.approx(2e-3 / 300)
    best = min(validations, key=lambda line: line["loss"])
    assert summary["selected_step"] == best["step"]
    assert summary["config"]["labels"] == {"negative": " negative", "positive": " positive"}
    assert summary["data"]["test"] == 60
    assert summary["saturated"] == {} and summary["memory_bytes"]["residuals"] == 0  # float32 weights
    assert summary["peak_rss_bytes"] > 2**20
    assert summary["seconds"]["step"] > 0
    assert len(list((finished / "checkpoint").iterdir())) == 1 + len({300, best["step"]})


def test_a_finished_run_is_not_run_again(finished: Path) -> None:
    before = (finished / "summary.json").stat().st_mtime_ns
    summary = finetune(resumed_config(finished, {}), resume=True)
    assert summary["steps"] == 300
    assert (finished / "summary.json").stat().st_mtime_ns == before


def test_the_best_weights_are_kept(inputs: dict[str, object], tmp_path: Path) -> None:
    """With a learning rate that destroys the model, the best weights are early ones, and those are saved."""
    wild = {**inputs, "lr": 0.1, "steps": 12, "eval_every": 4}
    kept = finetune(FinetuneConfig(**wild, output=tmp_path / "best"))
    last = finetune(FinetuneConfig(**wild, keep_best=False, output=tmp_path / "last"))
    assert kept["selected_step"] < 12 == last["selected_step"]
    assert not same(tmp_path / "best", tmp_path / "last")
    if kept["selected_step"] == 0:
        start = AutoModelForCausalLM.from_pretrained(str(inputs["model"])).state_dict()
        assert all(torch.equal(value, start[name]) for name, value in weights(tmp_path / "best").items())
    assert kept["test"]["after"]["loss"] < last["test"]["after"]["loss"]


def test_biases_are_saved_beside_a_generation_config_that_transformers_would_not_save(inputs, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(str(inputs["model"]), base)
    path = base / "generation_config.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**kept, "temperature": 0.7, "do_sample": False, "sequence_bias": [[[3, 4], -1.0]]}))
    summary = finetune(FinetuneConfig(**{**inputs, "model": str(base), "steps": 2}, output=tmp_path / "run"))
    found = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())["sequence_bias"]
    assert found[0] == [[3, 4], -1.0] and [b for _, b in found[1:]] == list(summary["label_bias"].values())
    kept = [tmp_path / name / "generation_config.json" for name in ("run/model", "again", "before")]
    replay_model(str(base), tmp_path / "run", kept[1].parent, step=summary["selected_step"])
    replay_model(str(base), tmp_path / "run", kept[2].parent, step=2 - summary["selected_step"])
    assert kept[0].read_bytes() == kept[1].read_bytes() != kept[2].read_bytes()
    tuned = prepare(FinetuneConfig(**{**inputs, "model": str(tmp_path / "run" / "model")}))
    assert tuned.scorer.left and tuned.scorer.biases.abs().min() > 0


def test_one_example_has_no_label_biases(inputs):
    assert FinetuneConfig(**{**inputs, "batch_size": 1}).label_bias == 0
    with pytest.raises(ValidationError, match="label_bias needs batches of at least 2"):
        FinetuneConfig(**{**inputs, "batch_size": 1, "label_bias": 8})


def test_without_label_biases_a_run_is_as_before_there_were_any(inputs: dict[str, object], tmp_path: Path) -> None:
    options = {**inputs, "steps": 3, "label_bias": 0, "temperature": 1.0}
    summary = finetune(FinetuneConfig(**options, output=tmp_path))
    assert summary["label_bias"] == {} and summary["test"]["biases_alone"] is None
    session = prepare(FinetuneConfig(**options))
    plain = tasks.losses.cross_entropy(session.scorer.logits(session.batch_of(0)), session.batch_of(0).labels)
    assert float(session.loss_of(0)()) == float(plain.detach()) != float(prepare(FinetuneConfig(**inputs)).loss_of(0)())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").generation_config.sequence_bias is None


# ---- stopping and going on


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_resumed_run_is_the_same_run(inputs: dict[str, object], tmp_path: Path, kind: str) -> None:
    """Bit for bit, also with dropout (GPT-2 has it, and it uses torch's generator)."""
    options = {**inputs, "model": str(tiny_lm.save(tmp_path / kind, kind)), "dropout": kind == "gpt2"}
    options |= {"keep_best": False, "weight_decay": 0.1, "probes": 2, "lr": 1e-3}
    finetune(FinetuneConfig(**options, output=tmp_path / "whole"))
    finetune(FinetuneConfig(**{**options, "steps": 7}, output=tmp_path / "parts"))
    for steps in (16, 25):
        finetune(resumed_config(tmp_path / "parts", {"steps": steps}), resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert same(tmp_path / "parts", tmp_path / "whole")


@pytest.fixture(scope="module")
def uninterrupted(inputs: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    finetune(FinetuneConfig(**{**inputs, "steps": 200}, output=folder))
    return folder


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_process_goes_on_as_if_nothing_had_happened(
    inputs: dict[str, object], uninterrupted: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    """Stopped from outside in the middle of the steps: exit code, message, and in the end the same weights."""
    folder = tmp_path / "a run"
    child = start(inputs, folder, steps=200, save_every=0.002)
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_bytes().count(b'"step", "step": ') > 20):
        assert child.poll() is None and time.monotonic() < deadline, child.communicate()[0]
        time.sleep(0.01)
    child.send_signal(signum)
    said, _ = child.communicate(timeout=300)
    done = len(losses(folder)) if signum != signal.SIGKILL else 0
    assert done < 200, "the run was over before the signal came"
    assert not (folder / "summary.json").exists()
    if signum == signal.SIGKILL:
        assert child.returncode == -signum
        with open(metrics, "a") as file:
            file.write('{"kind": "st')  # what a kill in the middle of a line leaves
    else:
        assert child.returncode == 128 + signum, said
        assert torch.load(folder / "checkpoint" / "state.pt")["state"]["step"] == done
        assert f"zo-core finetune --output '{folder}' --resume" in said
    summary = finetune(resumed_config(folder, {}), resume=True)
    assert losses(folder) == losses(uninterrupted)
    assert same(folder, uninterrupted)
    journal = (folder / "journal.zoj").read_bytes()
    assert journal == (uninterrupted / "journal.zoj").read_bytes()
    replay_model(str(inputs["model"]), folder, tmp_path / "again" / "model", step=summary["selected_step"])
    assert same(tmp_path / "again", folder)


@pytest.mark.parametrize("when", ["before", "validation", "step", "after"])
def test_a_stop_in_any_phase_can_be_resumed(
    inputs: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The signal's flag is raised in each phase of a run in turn."""
    folder = tmp_path / "run"
    calls = {"evaluate": 0, "step": 0}
    evaluate, step = runs.Run.evaluate, runs.Run.step

    def stopping_evaluate(run: runs.Run, part: str, note: str, **options: Any) -> tasks.Evaluation:
        calls["evaluate"] += 1
        if calls["evaluate"] == {"before": 1, "validation": 3, "after": 5}.get(when):
            run.signum = signal.SIGINT
        return evaluate(run, part, note, **options)

    def stopping_step(run: runs.Run) -> float:
        calls["step"] += 1
        if when == "step" and calls["step"] == 10:
            run.signum = signal.SIGINT
        return step(run)

    options = {**inputs, "steps": 20, "lr": 1.0, "batch_size": 16, "temperature": 1.0}  # a rate that makes it worse
    whole = finetune(FinetuneConfig(**{**options, "steps": 25}, output=tmp_path / "whole"))
    assert whole["selected_step"] < 20, "a stop while the best weights are in the model must not lose the last ones"
    monkeypatch.setattr(runs.Run, "evaluate", stopping_evaluate)
    monkeypatch.setattr(runs.Run, "step", stopping_step)
    with pytest.raises(RunInterrupted):
        finetune(FinetuneConfig(**options, output=folder))
    monkeypatch.undo()
    finetune(resumed_config(folder, {"steps": 25}), resume=True)
    assert same(folder, tmp_path / "whole")
    assert losses(folder) == losses(tmp_path / "whole")
    kinds = [[(x["kind"], x["step"]) for x in runs.read_metrics(f)] for f in (folder, tmp_path / "whole")]
    assert kinds[0] == kinds[1]


def test_a_damaged_journal_stops_a_resumed_run_and_a_missing_one_does_not(
    inputs: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, options = tmp_path / "run", {**inputs, "steps": 4}
    finetune(FinetuneConfig(**options, output=folder))
    journal = folder / "journal.zoj"
    journal.write_bytes(journal.read_bytes()[:-100])
    with pytest.raises(
        RunError, match=r"all 4 steps that the optimizer has taken, got 2 .*; if no other .* remove .* to go on without"
    ):
        finetune(resumed_config(folder, {"steps": 6}), resume=True)
    journal.unlink()
    assert finetune(resumed_config(folder, {"steps": 6}), resume=True, console=Console(width=300))["steps"] == 6
    assert not journal.exists()
    assert f"{journal} is missing: going on without a journal" in capsys.readouterr().out


def test_what_a_resumed_run_needs_must_be_there(inputs: dict[str, object], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    finetune(FinetuneConfig(**{**inputs, "steps": 4}, output=folder))
    metrics, journal = folder / "metrics.jsonl", (folder / "journal.zoj").read_bytes()
    whole = metrics.read_bytes()
    for damaged, says in (
        (whole[:100], "it has 100 bytes, not"),
        (b"garbage " * len(whole), "Expecting value"),
        (b"[]\n" * len(whole), "list indices"),
        (b"\xff" * len(whole), "can't decode"),
    ):
        metrics.write_bytes(damaged)
        with pytest.raises(RunError, match=rf"metrics.jsonl' is not as a run wrote it: .*{says}.*; --overwrite"):
            finetune(resumed_config(folder, {"steps": 6}), resume=True)
        assert metrics.read_bytes() == damaged
    metrics.write_bytes(whole)
    with open(folder / "journal.zoj", "ab") as other:
        assert lock(other)
        with pytest.raises(RunError, match="is open for writing already"):
            finetune(resumed_config(folder, {"steps": 6}), resume=True)
    assert json.loads((folder / "config.json").read_text())["steps"] == 4
    shutil.rmtree(folder / "checkpoint")
    with pytest.raises(RunError, match="has no checkpoint to go on from; --overwrite starts the run again"):
        finetune(resumed_config(folder, {"steps": 6}), resume=True)
    assert (folder / "journal.zoj").read_bytes() == journal and metrics.read_bytes() == whole


def test_a_time_budget_counts_over_resumes(inputs: dict[str, object], tmp_path: Path) -> None:
    options = {**inputs, "steps": None, "time_budget": "0.3s", "eval_every": 1000}
    first = finetune(FinetuneConfig(**options, output=tmp_path / "run"))
    assert first["seconds"]["training"] >= 0.3
    second = finetune(resumed_config(tmp_path / "run", {"time_budget": "0.6s"}), resume=True)
    assert second["steps"] > first["steps"]
    assert second["seconds"]["training"] >= 0.6


# ---- the folder


def test_two_runs_do_not_share_a_folder(inputs: dict[str, object], tmp_path: Path) -> None:
    """The second is refused while the first is at work, whether it would start, replace, resume or sweep."""
    folder, config = tmp_path / "run", FinetuneConfig(**{**inputs, "steps": 2}, output=tmp_path / "run")
    again: list[str] = []

    def also(run: runs.Run) -> float:
        for attempt in (
            lambda: finetune(config),
            lambda: finetune(config, overwrite=True),
            lambda: finetune(config, resume=True),
            lambda: sweep(config),
        ):
            with pytest.raises(RunError) as refused:
                attempt()
            again.append(str(refused.value))
        return step(run)

    step = runs.Run.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Run, "step", also)
        finetune(config)
    taken = f"--output {str(folder)!r}: another run is at work there"
    assert len(again) == 8 and all(taken in text for text in again), again
    assert len(losses(folder)) == 2 and (folder / "journal.zoj").exists()


def test_two_processes_started_at_once_are_one_run(inputs: dict[str, object], tmp_path: Path) -> None:
    """One is let in, and its journal makes its model; the lock of a killed process holds nobody up."""
    folder = tmp_path / "run"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder)], env=environment(), capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    children = [start(inputs, folder, steps=60) for _ in range(2)]
    said = [child.communicate(timeout=300)[0] for child in children]
    assert sorted(child.returncode for child in children) == [0, 2], said
    assert any("another run is at work there" in text or "already holds a run" in text for text in said)
    summary = json.loads((folder / "summary.json").read_text())
    replay_model(str(inputs["model"]), folder, tmp_path / "again" / "model", step=summary["selected_step"])
    assert same(tmp_path / "again", folder)


def test_a_full_disk_is_one_message_and_loses_nothing(inputs: dict[str, object], tmp_path: Path) -> None:
    """Files may have 6, 60 and 90 kB: too few for the config, for a checkpoint, and for the second half of one."""
    folder = tmp_path / "run"
    finetune(FinetuneConfig(**{**inputs, "steps": 2}, output=folder))
    model, before = weights(folder), {p.name: p.read_bytes() for p in (folder / "checkpoint").iterdir()}
    child = start(inputs, folder, resume=True, steps=4, limits="6000,60000,90000")
    said = child.communicate(timeout=300)[0]
    assert said.count("exit code 2") == said.count("cannot be written: ") == said.count("make room there and") == 3, (
        said
    )
    assert "Traceback" not in said
    assert {p.name: p.read_bytes() for p in (folder / "checkpoint").iterdir()} == before
    assert not list(folder.rglob("*.part"))
    kept = weights(folder)
    assert all(torch.equal(kept[name], model[name]) for name in model)
    assert finetune(resumed_config(folder, {"steps": 4}), resume=True)["steps"] == 4


def test_the_model_stays_until_the_new_one_is_whole(
    inputs: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    finetune(FinetuneConfig(**{**inputs, "steps": 2}, keep_best=False, output=folder))
    before = weights(folder)

    def full(model: object, path: Path) -> None:
        path.mkdir()
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(RunError, match="cannot be written: No space left on device; make room"):
        finetune(resumed_config(folder, {"steps": 4}), resume=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(folder).items())
    monkeypatch.undo()
    finetune(resumed_config(folder, {"steps": 4}), resume=True)
    assert not all(torch.equal(tensor, before[name]) for name, tensor in weights(folder).items())


# ---- runs that cannot be


def test_a_run_without_a_finite_loss_stops(inputs: dict[str, object], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(inputs["model"]))
    model.model.layers[0].mlp.up_proj.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "nan")
    AutoTokenizer.from_pretrained(str(inputs["model"])).save_pretrained(tmp_path / "nan")
    options = {**inputs, "model": str(tmp_path / "nan")}
    with pytest.raises(RunError, match=r"20 steps in a row were skipped.*smaller --lr"):
        finetune(FinetuneConfig(**options, output=tmp_path / "run"))
    with pytest.raises(RunError, match="3 steps in a row were skipped"):
        finetune(FinetuneConfig(**{**options, "steps": 3}, output=tmp_path / "short"))


def test_a_taken_folder_is_left_alone(inputs: dict[str, object], tmp_path: Path) -> None:
    folder, options = tmp_path / "run", {**inputs, "steps": 2}
    finetune(FinetuneConfig(**options, output=folder))
    with pytest.raises(RunError, match="already holds a run; --resume goes on with it, --overwrite replaces it"):
        finetune(FinetuneConfig(**options, output=folder))
    (folder / "notes.txt").write_text("mine")
    wrong = {**options, "data": str(tmp_path / "nothing.csv")}
    with pytest.raises(tasks.TaskError):  # and the run that was to be replaced is still there
        finetune(FinetuneConfig(**wrong, output=folder), overwrite=True)
    assert (folder / "summary.json").exists() and (folder / "model").is_dir()
    finetune(FinetuneConfig(**{**options, "steps": 3}, output=folder), overwrite=True)
    assert len(losses(folder)) == 3
    assert (folder / "notes.txt").exists()
    foreign = tmp_path / "foreign"
    (foreign / "model").mkdir(parents=True)
    (foreign / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(RunError, match="files that are not a run's"):
        finetune(FinetuneConfig(**options, output=foreign), overwrite=True)
    assert (foreign / "model").exists()
    with pytest.raises(RunError, match="cannot be written"):
        finetune(FinetuneConfig(**options, output=folder / "notes.txt" / "run"))


def test_a_run_of_a_version_without_grouped_batches_goes_on_without_them(
    inputs: dict[str, object], tmp_path: Path
) -> None:
    """That version chose the weights to keep by accuracy, and wrote its best one into the state."""
    inputs = {**inputs, "group_by_length": False, "keep_best": False}
    whole = FinetuneConfig(**{**inputs, "steps": 4}, output=tmp_path / "whole")
    finetune(whole)
    folder = tmp_path / "run"
    finetune(FinetuneConfig(**{**inputs, "steps": 2}, output=folder))
    stored = json.loads((folder / "config.json").read_text())
    del stored["group_by_length"]
    (folder / "config.json").write_text(json.dumps(stored))
    kept = torch.load(folder / "checkpoint" / "state.pt")
    del kept["state"]["best_loss"]
    kept["state"]["best"] = (0.5, -0.7)
    torch.save(kept, folder / "checkpoint" / "state.pt")
    finetune(resumed_config(folder, {"steps": 4}), resume=True)
    assert losses(folder) == losses(whole.output) and same(folder, whole.output)
    assert torch.load(folder / "checkpoint" / "state.pt")["state"]["best_loss"] == 0.7


def test_a_resumed_run_keeps_its_options(inputs: dict[str, object], tmp_path: Path) -> None:
    finetune(FinetuneConfig(**{**inputs, "steps": 2}, output=tmp_path / "run"))
    with pytest.raises(RunError, match=r"--seed was 0 in .*, got 1"):
        resumed_config(tmp_path / "run", {"seed": 1})
    assert resumed_config(tmp_path / "run", {"seed": 0, "time_budget": "2m"}).time_budget == 120
    with pytest.raises(RunError, match="there is no config.json"):
        resumed_config(tmp_path / "other", {})
    (tmp_path / "run" / "checkpoint" / "state.pt").write_bytes(b"broken")
    with pytest.raises(RunError, match=r"checkpoint in .* cannot be read"):
        finetune(resumed_config(tmp_path / "run", {"steps": 3}), resume=True)


def test_a_resumed_run_says_what_changed(inputs: dict[str, object], tmp_path: Path) -> None:
    """Another method by its name, also where it does not take the stored options; the data and a damaged summary."""
    folder, data = tmp_path / "run", tmp_path / "data.jsonl"
    data.write_bytes(Path(str(inputs["data"])).read_bytes())
    finetune(FinetuneConfig(**{**inputs, "data": str(data), "method": "spsa", "steps": 2}, output=folder))
    with pytest.raises(RunError, match=r"--method was 'spsa' in .*, got 'mezo'; a resumed run keeps it"):
        resumed_config(folder, {"method": "mezo", "steps": 3})
    (folder / "summary.json").write_text("[]")  # made again
    assert finetune(resumed_config(folder, {}), resume=True)["steps"] == 2
    text = data.read_text()
    data.write_text(text.replace("good", "fine", 1))
    with pytest.raises(RunError, match=r"--data '.*data.jsonl' or the tokenizer of --model .* is not as it was in"):
        finetune(resumed_config(folder, {"steps": 3}), resume=True)
    data.write_text(text)
    assert finetune(resumed_config(folder, {"steps": 3}), resume=True)["steps"] == 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"model": "/no/such/folder"}, "expected a folder with a model, found nothing there"),
        ({"model": __file__}, "found a file there"),
        ({"model": str(Path(__file__).parent)}, "does not load"),
        ({"device": "cuda:99"}, "--device 'cuda:99' cannot be used"),
        ({"device": "abacus"}, "--device 'abacus' cannot be used"),
        ({"device": "meta"}, "--device 'meta' cannot be used"),
    ],
)
def test_models_and_devices_that_do_not_work(inputs: dict[str, object], options: dict[str, str], expected: str) -> None:
    with pytest.raises(RunError) as caught:
        prepare(FinetuneConfig(**{**inputs, **options}))
    assert expected in str(caught.value)


def of_the_kind(kind: str, tiny: Path, folder: Path) -> None:
    """A model folder with this fault, from a tiny Llama's."""
    shutil.copytree(tiny, folder)
    config, weight_file = folder / "config.json", folder / "model.safetensors"
    llama = LlamaForCausalLM.from_pretrained(tiny)
    bert = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = BertConfig(**bert, intermediate_size=32)
    if kind == "cut off":
        weight_file.write_bytes(weight_file.read_bytes()[:5000])
    elif kind == "wrong type":
        config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": "many"'))
    elif kind == "other shapes":
        config.write_text(config.read_text().replace('"intermediate_size": 64', '"intermediate_size": 65'))
    elif kind == "tokenizer":
        (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    elif kind == "classifier":
        llama.config.tie_word_embeddings = False
        LlamaForSequenceClassification(llama.config).save_pretrained(folder)
    elif kind == "masked":
        model = BertForMaskedLM(small)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(0))
        model.save_pretrained(folder)
    elif kind == "body":
        BertModel(small).save_pretrained(folder)
    elif kind == "small embedding":
        llama.resize_token_embeddings(300)
        llama.save_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cut off", r"does not load: .*not fully covered"),
        ("wrong type", r"does not load: .*hidden_size"),
        ("tokenizer", "does not load"),
        (
            "other shapes",
            r"lacks model.layers.0.mlp.down_proj.weight, .* and 3 more in the shape that LlamaForCausalLM has",
        ),
        ("classifier", r"lacks lm_head.weight .* got LlamaForSequenceClassification"),
        ("body", r"lacks cls.predictions.bias, .* that BertLMHeadModel has.* got BertModel"),
        ("masked", r"expected a causal language model, got BertLMHeadModel whose tokens see those that follow"),
        ("small embedding", r"its tokenizer has \d+ tokens and gives number \d+ .*, its embedding has 300 rows"),
    ],
)
def test_folders_that_hold_no_whole_causal_model_are_refused(
    inputs: dict[str, object], tmp_path: Path, kind: str, expected: str
) -> None:
    of_the_kind(kind, Path(str(inputs["model"])), tmp_path / "model")
    with torch.random.fork_rng(), pytest.raises(RunError, match=rf"--model '.*model' ?.*{expected}"):
        prepare(FinetuneConfig(**{**inputs, "model": str(tmp_path / "model")}))


# ---- configuration


def test_durations_and_defaults() -> None:
    given = {"90s": 90, "8m": 480, "2h": 7200, "1h30m": 5400, "1.5m": 90, "45": 45, 30: 30}
    assert {text: FinetuneConfig(time_budget=text).time_budget for text in given} == given
    assert FinetuneConfig().time_budget == 480
    assert FinetuneConfig(steps=5).time_budget is None
    assert FinetuneConfig(labels=[]).labels is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0},
        {"lr": float("nan")},
        {"eps": -1},
        {"steps": 0},
        {"time_budget": "soon"},
        {"time_budget": ""},
        {"labels": ["x"]},
        {"method": "adam"},
        {"unknown": 1},
        {"warmup": 1},
        {"seed": -1},
        {"batch_size": 0},
        {"validation_size": 1.5},
        {"test_size": 20.5},
    ],
)
def test_wrong_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        FinetuneConfig(**wrong)


def test_learning_rate_over_a_run() -> None:
    config = FinetuneConfig(lr=2.0, steps=100, time_budget="100s", warmup=0.1)
    assert config.progress(30, 20) == 0.3
    assert config.progress(30, 40) == 0.4
    at = (0, 0.05, 0.1, 0.55, 1)
    shapes = {"constant": [0, 1, 2, 2, 2], "linear": [0, 1, 2, 1, 0], "cosine": [0, 1, 2, 1, 0]}
    for schedule, expected in shapes.items():
        found = config.model_copy(update={"schedule": schedule})
        assert [found.lr_at(p) for p in at] == pytest.approx(expected)


def test_the_loss_of_a_run_has_its_temperature(inputs: dict[str, object]) -> None:
    session = prepare(FinetuneConfig(**inputs, temperature=5.0))
    expected = session.scorer.loss(session.batch_of(2), temperature=5.0, fit_biases=True)
    assert float(session.loss_of(2)()) == float(expected.detach()) == pytest.approx(5 * math.log(2), abs=0.3)


def test_a_run_can_be_resumed_from_another_directory(
    inputs: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative paths of model and data are stored in full."""
    model, data = Path(str(inputs["model"])), Path(str(inputs["data"]))
    monkeypatch.chdir(data.parent)
    options = {**inputs, "model": os.path.relpath(model), "data": data.name, "steps": 2}
    finetune(FinetuneConfig(**options, output=tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    assert finetune(resumed_config(tmp_path / "run", {"steps": 3}), resume=True)["steps"] == 3


def test_a_fault_of_the_journal_is_said_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"run.zoj: was cut by someone else"), own_folder(tmp_path):
        raise JournalError("run.zoj: was cut by someone else since it was opened")
