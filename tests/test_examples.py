"""The examples run offline on their tiny model, and a training that was killed goes on as if it had not been."""

import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import zo_core

EXAMPLES = Path(__file__).parent.parent / "examples"
HERE = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example as a script, in this process: what it prints."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def script(name, *options):
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        with torch.random.fork_rng():
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return script


def number(pattern, text):
    return float(re.findall(pattern, text)[-1])


def test_trainer_killed_in_the_middle_and_resumed_ends_with_the_same_bits(tmp_path, run):
    whole = run("trainer.py", "--steps", 100, "--output", tmp_path / "whole")
    killed = subprocess.Popen(
        [sys.executable, EXAMPLES / "trainer.py", "--steps", "100", "--output", tmp_path / "killed"],
        env=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while killed.poll() is None and not (tmp_path / "killed" / "checkpoint-40").exists():
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    (tmp_path / "killed" / "checkpoint-99").mkdir()  # one that was never finished
    resumed = run("trainer.py", "--steps", 100, "--output", tmp_path / "killed", "--resume")
    assert "'epoch': '1.667'" not in resumed  # step 20 is not made again
    files = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert files[0] == files[1]
    assert number(r"'eval_loss': ([\d.]+),", whole) == number(r"'eval_loss': ([\d.]+),", resumed) < 3.5
    assert "100 updates" in whole and "100 updates" in resumed


def test_trainer_under_accelerate_launch(tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command = [*launch, EXAMPLES / "trainer.py", "--steps", "20", "--output", tmp_path]
    done = subprocess.run(command, env=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "20 updates" in done.stdout, done.stderr


def test_lora(tmp_path, run):
    output = run("lora.py", "--steps", 20, "--output", tmp_path)
    assert output.strip().endswith("} 0.0001") and (tmp_path / "adapter_model.safetensors").exists()


def test_accelerate_loop(tmp_path, run):
    output = run("accelerate_loop.py", "--epochs", 3, "--output", tmp_path)
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", output)]
    assert len(losses) == 3 and losses[-1] < losses[0] and (tmp_path / "model.safetensors").exists()


def test_accelerate_restores_the_state_of_a_registered_optimizer(tmp_path):
    model, x = torch.nn.Linear(3, 1), torch.ones(2, 3)
    opt, accelerator = zo_core.MeZO(model, lr=0.1), Accelerator(cpu=True)
    accelerator.prepare(model)
    accelerator.register_for_checkpointing(opt)

    def steps(n):
        for _ in range(n):
            opt.step(lambda: model(x).square().mean())
        return [p.detach().clone() for p in model.parameters()]

    steps(2)
    accelerator.save_state(str(tmp_path))
    expected = steps(3)
    accelerator.load_state(str(tmp_path))
    assert opt.updates == 2
    assert all(torch.equal(a, b) for a, b in zip(expected, steps(3), strict=True))


def test_lightning_module_trains_and_resumes_bit_for_bit(tmp_path, run):
    pytest.importorskip("lightning", reason="Lightning is not installed: pip install lightning")
    final = []
    for folder, parts in (("whole", [4]), ("parts", [2, 4])):
        for i, epochs in enumerate(parts):
            resume = ("--resume", tmp_path / folder / "last.ckpt") if i else ()
            output = run("lightning_module.py", "--epochs", epochs, "--output", tmp_path / folder, *resume)
        assert number(r"after (\d+) steps", output) == 48 and number(r"loss ([\d.]+) after", output) < 2.5
        final.append(torch.load(tmp_path / folder / "last.ckpt", weights_only=False)["state_dict"])
    assert all(torch.equal(final[0][k], final[1][k]) for k in final[0])


def test_generation_objective(run):
    output = run("generation_objective.py", "--steps", 40)
    before, after = map(float, re.findall(r"F1 ([\d.]+) -> ([\d.]+)", output)[0])
    assert after > before + 0.2
