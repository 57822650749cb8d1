"""The code of docs/integrations.md runs as it stands there, and what the documents link to exists."""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

DOCS = Path(__file__).parent.parent / "docs"
SECTIONS = re.split(r"^## ", (DOCS / "integrations.md").read_text(encoding="utf-8"), flags=re.M)
BLOCKS = {s.splitlines()[0]: found for s in SECTIONS if (found := re.findall(r"```python\n(.*?)```", s, re.S))}


@pytest.mark.parametrize("section", BLOCKS)
def test_integrations(section, tmp_path, monkeypatch):
    for needed in ("trl", "lightning"):
        if re.search(rf"(import|from) {needed}\b", "".join(BLOCKS[section])):
            pytest.importorskip(needed, reason=f"{needed} is not installed")
    monkeypatch.syspath_prepend(str(DOCS.parent / "examples"))
    monkeypatch.chdir(tmp_path)
    tiny = importlib.import_module("tiny")
    model, tokenizer = tiny.load(None)
    data = tiny.encode(tokenizer, tiny.reviews())
    config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0)  # fmt: skip
    module = ModuleType("page")  # whose classes can be pickled
    monkeypatch.setitem(sys.modules, "page", module)
    names = {
        "model": model, "tokenizer": tokenizer, "train": data[:192], "evaluation": data[192:], "collate": tiny.collate,
        "classifier": LlamaForSequenceClassification(config).bfloat16(),
        "classes": [{"input_ids": torch.arange(1, 9), "labels": i % 2} for i in range(40)],
    }  # fmt: skip
    if section == "TRL":
        from datasets import Dataset

        names["texts"] = Dataset.from_list([{"text": prompt + answer} for prompt, answer in tiny.reviews()[:40]])
    vars(module).update(names)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.random.fork_rng():
        for number, code in enumerate(BLOCKS[section]):
            exec(compile(code, f"{section}, block {number}", "exec"), vars(module))
    if section == "numpy":
        assert abs(module.w - 1).max() < 0.1
    elif section != "PEFT":
        assert not all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_every_linked_file_exists(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (DOCS / target).exists(), target
