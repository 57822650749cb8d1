"""The code in the README, docs/methods.md and docs/eps.md runs as it stands there."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_trains(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    with torch.random.fork_rng():
        torch.set_rng_state(torch.Generator().manual_seed(0).get_state())
        exec(code, {})
    loss, skipped = capsys.readouterr().out.split()
    assert float(loss) < 0.2 and skipped == "0"


def test_the_methods_page():
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "methods.md").read_text(encoding="utf-8"), re.S)
    for code in examples:
        with torch.random.fork_rng():
            exec(code, names := {})
        assert names["opt"].updates == 10
    assert len(examples) == 3


def test_the_eps_page(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "eps.md").read_text(encoding="utf-8"), re.S)
    with torch.random.fork_rng():
        exec(code, names := {})
    assert names["found"].evaluations == 153 and "two-sided: best eps" in capsys.readouterr().out


def test_every_linked_file_exists():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
