"""PEFT's adapters and frozen quantised bases with the shadow engine: only what trains is perturbed and moves."""

import pytest
import torch
from models import IDS, make
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import nn

import zo_core

CONFIGS = {
    "lora": LoraConfig(r=2, target_modules=["q_proj", "v_proj", "embed_tokens"], task_type=TaskType.CAUSAL_LM),
    "dora": LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type=TaskType.CAUSAL_LM),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type=TaskType.CAUSAL_LM),
    "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type=TaskType.CAUSAL_LM),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_only_adapters_are_perturbed_and_move(name):
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        model = get_peft_model(make("llama")[0], CONFIGS[name]).eval()
    for n, p in model.named_parameters():
        if "lora_B" in n or "lora_embedding_A" in n:  # zeros at first: nothing would show
            nn.init.constant_(p, 0.02)

    def loss():
        return model(input_ids=IDS, labels=IDS).loss

    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    probe = torch.tensor([3])
    shadow, inplace = (zo_core.MeZO(model, lr=0.1, eps=1e-2, seed=2, engine=e) for e in ("shadow", "inplace"))
    with torch.no_grad():
        seen = [shadow._prepare().evaluate(loss, c, probe) for c in (1e-2, -1e-2)]
        shadow._prepare().restore()
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        expected = [inplace._prepare().evaluate(loss, c, probe) for c in (1e-2, -1e-2)]
        inplace._prepare().restore()
    assert torch.allclose(torch.stack(seen), torch.stack(expected), atol=1e-6) and seen[0] != seen[1]
    for _ in range(3):
        shadow.step(loss)
    moved = {n for n, p in model.named_parameters() if not torch.allclose(p, before[n], atol=1e-6)}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
    assert shadow.memory()["held"] == 0
    with model.disable_adapter():
        assert torch.isfinite(loss())


def test_a_step_whose_closure_turns_adapters_off_for_a_reference():
    model = get_peft_model(make("llama")[0], CONFIGS["lora"]).eval()
    opt = zo_core.MeZO(model, lr=1e-3)

    def against_reference():
        loss = model(input_ids=IDS, labels=IDS).loss
        with model.disable_adapter():
            return loss - model(input_ids=IDS, labels=IDS).loss

    opt.step(against_reference)
    assert opt.updates == 1


class Int8Linear(nn.Module):
    """A frozen matrix of 8-bit integers with a scale, and a low-rank adapter that trains."""

    def __init__(self, base):
        super().__init__()
        scale = base.weight.detach().abs().amax() / 127
        self.register_buffer("weight", (base.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.down, self.up = (
            nn.Parameter(torch.randn(2, base.in_features) * 0.1),
            nn.Parameter(torch.ones(base.out_features, 2)),
        )

    def forward(self, x):
        return x @ (self.weight.float() * self.scale).t() + x @ self.down.t() @ self.up.t()


def test_a_quantised_base_is_left_alone():
    model, x = nn.Sequential(Int8Linear(nn.Linear(8, 8)), nn.Tanh(), Int8Linear(nn.Linear(8, 8))), torch.randn(4, 8)
    before = {n: b.clone() for n, b in model.named_buffers()}
    opt = zo_core.MeZO(model, lr=1e-3)
    assert set(opt.param_groups[0]["param_names"]) == {"0.down", "0.up", "2.down", "2.up"}
    losses = [float(opt.step(lambda: model(x).square().mean())) for _ in range(60)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
