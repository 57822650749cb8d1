"""The command line: what a user types, what comes back, and that no mistake ends in a traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_lm
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM
from typer.testing import CliRunner, Result

from zo_core.cli import app
from zo_core.integrations import report
from zo_core.integrations.config import FinetuneConfig


def call(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny model and a CSV with columns and label values of its own."""
    folder = tmp_path_factory.mktemp("inputs")
    lines = [
        "body,stars",
        *(f"{text},{5 if label == 'positive' else 1}" for text, label in tiny_lm.rows(200)),
    ]
    (folder / "data.csv").write_text("\n".join(lines))
    (folder / "other.csv").write_text("\n".join(lines[:31]))
    options = f"--model {tiny_lm.save(folder / 'model')} --data {folder / 'data.csv'} --text-column body"
    options += " --label-column stars --validation-size 20 --test-size 40 --no-autocast"
    return [*options.split(), "--label", "1= negative", "--label", "5= positive", "--template", r"{text}\n:"]


def test_help_has_examples_groups_and_every_option() -> None:
    text = call("finetune", "--help").output
    assert "zo-core finetune --time-budget 20m" in text
    for group in ("Model", "Data", "Method", "Run"):
        assert f"─ {group} ─" in text
    names = {name.replace("_", "-") for name in FinetuneConfig.model_fields} - {"labels"} | {
        "label",
        "resume",
    }
    assert [name for name in names if f"--{name}" not in text] == []
    assert "zo-core evaluate runs/reviews" in call("evaluate", "--help").output
    assert "zo-core probe --method mezo" in call("probe", "--help").output
    assert "zo-core replay smollm2 runs/reviews tuned" in call("replay", "--help").output
    assert all(name in call("--help").output for name in ("finetune", "probe", "evaluate", "replay", "doctor"))


def test_finetune_then_evaluate_then_resume(inputs: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = call("finetune", *inputs, "--steps", 6, "--lr", 1e-3, "--eval-every", 3, "-o", folder)
    assert result.exit_code == 0, result.output
    assert "step 3: validation accuracy" in result.output
    assert "test accuracy after" in result.output
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["config"]["template"] == "{text}\n:"
    assert summary["config"]["labels"] == {"1": " negative", "5": " positive"}

    for target in (folder, folder / "model"):
        found = json.loads(call("evaluate", target, "--json").stdout)
        expected = summary["test"]["after"]
        assert (found["n"], found["accuracy"]) == (expected["n"], expected["accuracy"])
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    other = Path(inputs[3]).with_name("other.csv")
    assert json.loads(call("evaluate", folder, "--data", other, "--part", "all", "--json").stdout)["n"] == 30
    assert "40 examples" in call("evaluate", folder).output

    result = call("finetune", "-o", folder, "--resume", "--steps", 8)
    assert result.exit_code == 0, result.output
    assert json.loads((folder / "summary.json").read_text())["steps"] == 8
    assert "this run is finished" in call("finetune", "-o", folder, "--resume").output


def test_probe_says_how_large_eps_should_be(inputs: list[str], tmp_path: Path) -> None:
    options = [*inputs, "--method", "mezo", "--draws", 2, "--least", 1e-3, "--label-bias", 0]
    drawn = tmp_path / "eps.png"
    result = call("probe", *options, "--plot", drawn)
    assert result.exit_code == 0, result.output
    assert "mezo takes two-sided differences: --eps" in result.output and "1.0e-03" in result.output
    assert drawn.read_bytes().startswith(b"\x89PNG")
    found = json.loads(call("probe", *options, "--json").stdout)
    assert [rung["eps"] for rung in found["rungs"]] == pytest.approx([1e-3, 10**-2.5, 1e-2, 10**-1.5, 1e-1])
    assert found["evaluations"] == 5 * 5 and found["recommended"].keys() == found["good"].keys()
    assert found["rungs"][0]["two_sided"]["correlation"] > 0.999  # float32
    for arguments, says in (
        (["--most", 1e-2], "--most: expected at least 1.5 decades above --least 0.001, got 0.01"),
        (["--plot", tmp_path / "no" / "eps.png"], "expected a file in a folder that exists"),
        (["--plot", tmp_path / "eps.nothing"], "cannot be written"),
    ):
        result = call("probe", *options, *arguments)
        assert result.exit_code == 2 and says in result.output, result.output


def test_replay_makes_a_run_again_as_a_folder_and_as_a_file(inputs: list[str], tmp_path: Path) -> None:
    base, run = inputs[1], tmp_path / "run"
    options = ["--steps", 7, "--lr", 1e-3, "--eval-every", 100, "--no-keep-best", "--dtype", "bfloat16"]
    assert call("finetune", *inputs, *options, "-o", run).exit_code == 0
    result = call("replay", base, run, tmp_path / "again")
    assert result.exit_code == 0, result.output
    assert "step 7 of 7 written to" in result.output
    expected = load_file(run / "model" / "model.safetensors")
    found = load_file(tmp_path / "again" / "model.safetensors")
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in found)
    assert (tmp_path / "again" / "tokenizer.json").exists()

    torn = tmp_path / "torn.zoj"
    torn.write_bytes((run / "journal.zoj").read_bytes() + b"torn")
    file = f"{base}/model.safetensors"
    assert "4 bytes at the journal's end" in call("replay", file, torn, tmp_path / "again.safetensors").output
    found = load_file(tmp_path / "again.safetensors")
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in found)
    assert call("replay", file, torn, tmp_path / "before.safetensors", "--step", 0).exit_code == 0
    before = {name: x.bfloat16() for name, x in load_file(file).items()}
    found = load_file(tmp_path / "before.safetensors")
    assert all(torch.equal(before[name], found[name]) for name in found)

    for arguments, says in (
        ((base, run, tmp_path / "again"), "OUT"),
        ((file, run, tmp_path / "new"), "expected a .safetensors file, as BASE is one"),
        ((base, run, tmp_path / "new", "--step", 8), "--step: expected 0 to 7"),
        ((run / "model", run, tmp_path / "new"), "base: expected weights with SHA-256"),
        ((base, run / "config.json", tmp_path / "new"), "the file is none"),
        ((base, run / "nothing", tmp_path / "new"), "No such file"),
        ((tmp_path / "nothing", run, tmp_path / "new"), "BASE"),
        ((tmp_path / "no.safetensors", run, tmp_path / "new.safetensors"), "No such file"),
    ):
        result = call("replay", *arguments)
        assert result.exit_code == 2 and says in result.output, result.output
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--lr", "-1"], "--lr: Input should be greater than 0, got -1.0"),
        (["--lr", "fast"], "Invalid value for '--lr'"),
        (
            ["--time-budget", "soon"],
            "--time-budget: expected a time such as 90s, 8m, 2h or 1h30m, got 'soon'",
        ),
        (["--label", "positive"], "--label: expected VALUE=WORD"),
        (["--method", "adam"], "Invalid value for '--method'"),
        (["--lr", "inf"], "--lr: Input should be a finite number, got inf"),
        (["--eps", "inf"], "--eps: Input should be a finite number, got inf"),
        (["--weight-decay", "inf"], "--weight-decay: Input should be a finite number, got inf"),
        (["--eps", "1e-40"], "--method fzoo: eps: expected a finite number from 1e-30 to 1e+30, got 1e-40"),
        (["--probes", "9999999"], "--method fzoo: probes: expected a finite number from"),
        (["--method", "fzoo", "--probes", "1"], "--method fzoo: probes: expected"),
        (["--method", "spsa", "--smoothing", ".1"], "error smoothing is an option of hizoo, hizoo-l; spsa has none"),
        (["--method", "fzoo", "--alpha", ".1"], "error alpha is an option of spsa; fzoo has none"),
        (["--data", "nowhere.csv"], "data 'nowhere.csv' cannot be read: No such file"),
        (["--data", "everything"], "expected a name (reviews, products, tweets) or a file ending in .csv"),
        (["--text-column", "txt"], "expected one column 'txt', found 'body', 'stars'"),
        (["--label", "4= b"], "--label: '4' never occurs as a label; the data has '5' (100), '1' (100)"),
        (["--template", "Review:"], "--template: expected {text}"),
        (["--label", "5= bad"], "--label: expected one word for '5', got [' positive', ' bad']"),
        (["--test-size", "500"], "--test-size 500 and --validation-size 20: expected no empty part"),
        (
            ["--model", "./nowhere"],
            "--model './nowhere': expected a folder with a model, found nothing there",
        ),
        (["--device", "cuda:9"], "--device 'cuda:9' cannot be used"),
        (["--resume"], "holds no run to resume: there is no config.json"),
        (["--resume", "--overwrite"], "exclude each other"),
        (["--output", "/proc/run"], "cannot be written"),
    ],
)
def test_mistakes_are_one_readable_message_and_exit_code_2(
    inputs: list[str], tmp_path: Path, arguments: list[str], expected: str
) -> None:
    result = call("finetune", *inputs, "--steps", 1, "--output", tmp_path / "run", *arguments)
    said = " ".join(result.output.split())
    assert result.exit_code == 2, result.output
    assert expected in said
    assert "Traceback" not in said and "{'" not in said
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_method_that_the_model_does_not_serve_is_one_readable_message(inputs: list[str], tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(inputs[1])
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    model.save_pretrained(tmp_path / "one")
    tiny_lm.tokenizer().save_pretrained(tmp_path / "one")
    for command in ("finetune", "sweep"):
        for options in (["--method", "lezo"], ["--method", "mezo", "--rho", 0.5]):
            result = call(command, *inputs, "--model", tmp_path / "one", "--steps", 4, "-o", tmp_path / "run", *options)
            assert result.exit_code == 2, result.output
            assert f"error --method {options[1]}: blocks: expected" in result.output
    assert not (tmp_path / "run" / "sweep.json").exists()


def test_mistakes_of_evaluate(inputs: list[str], tmp_path: Path) -> None:
    result = call("evaluate", tmp_path / "nothing", "--data", inputs[3])
    assert result.exit_code == 2
    assert "--part: expected one of train" in call("evaluate", tmp_path, "--part", "none").output


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    result = call("doctor")
    assert result.exit_code == 0, result.output
    assert "native library" in result.output
    found = json.loads(call("doctor", "--json").output)
    assert found["usable"] is True
    assert {"zo_core", "torch", "transformers", "GPU", "cache folder"} <= {f["what"] for f in found["findings"]}
    monkeypatch.setattr(
        report,
        "versions",
        lambda: {**dict.fromkeys(("zo_core", "torch", "python", "triton"), "1"), "transformers": None},
    )
    result = call("doctor", "--json")
    assert result.exit_code == 1
    (transformers,) = [f for f in json.loads(result.output)["findings"] if f["what"] == "transformers"]
    assert (transformers["state"], transformers["advice"]) == ("missing", "pip install 'zo_core[train]'")


def test_help_loads_no_heavy_package() -> None:
    code = "import sys\nfrom zo_core.cli import app\ntry: app(['finetune', '--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('transformers', 'matplotlib', 'triton', 'gguf') if m in sys.modules])"
    root = Path(report.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
