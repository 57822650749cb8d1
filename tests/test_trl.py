"""The mixin on a trainer that is built on Trainer: TRL's SFTTrainer. Skipped where TRL is not installed."""

from dataclasses import dataclass

import pytest
import tiny_lm
import torch
from transformers import LlamaForCausalLM

from zo_core.integrations.transformers import ZOArguments, ZOMixin

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
datasets = pytest.importorskip("datasets")


@dataclass
class ZOSFTConfig(ZOArguments, trl.SFTConfig):
    pass


class ZOSFTTrainer(ZOMixin, trl.SFTTrainer):
    pass


def test_sft(tmp_path):
    data = datasets.Dataset.from_list([{"text": f"Review: {a}\nSentiment: {b}"} for a, b in tiny_lm.rows(24)])
    folder = tiny_lm.save(tmp_path / "tiny")

    def trainer(**more):
        args = ZOSFTConfig(
            output_dir=str(tmp_path / "run"), max_steps=6, save_strategy="steps", save_steps=3, learning_rate=1e-3, bf16=False,
            gradient_accumulation_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, **more,
        )  # fmt: skip
        model = LlamaForCausalLM.from_pretrained(folder)
        return ZOSFTTrainer(model, args, train_dataset=data, processing_class=tiny_lm.tokenizer())

    def weights(run):
        return [p.detach() for p in run.model.parameters()]

    with torch.random.fork_rng():
        whole, part, inplace = trainer(), trainer(), trainer(engine="inplace")
        whole.train()
        part.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
        inplace.train()
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(part), strict=True))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(weights(whole), weights(inplace), strict=True))
    assert whole.zo_optimizer.updates == 6 and all(p.grad is None for p in whole.model.parameters())
