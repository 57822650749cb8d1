"""The models of bench/gpu.py: sizes as published, written out so that nothing is fetched; weights are random."""

from typing import Any

import torch
from torch import Tensor, nn

# hidden, layers, heads, inner
_OPT = {"OPT-125M": (768, 12, 12, 3072), "OPT-1.3B": (2048, 24, 32, 8192), "OPT-13B": (5120, 40, 40, 20480)}
NAMES = (*_OPT, "Llama-3-8B")


def config(name: str, tiny: bool = False) -> Any:
    """The transformers configuration; ``tiny``: the same architecture, as small as it goes."""
    from transformers import LlamaConfig, OPTConfig

    if name in _OPT:
        hidden, layers, heads, inner = (32, 2, 2, 64) if tiny else _OPT[name]
        return OPTConfig(
            vocab_size=128 if tiny else 50272, hidden_size=hidden, word_embed_proj_dim=hidden, num_hidden_layers=layers,
            num_attention_heads=heads, ffn_dim=inner, max_position_embeddings=16 if tiny else 2048, dropout=0.0, attention_dropout=0.0,
        )  # fmt: skip
    return LlamaConfig(
        vocab_size=128 if tiny else 128256, hidden_size=32 if tiny else 4096, num_hidden_layers=2 if tiny else 32,
        num_attention_heads=2 if tiny else 32, num_key_value_heads=1 if tiny else 8, intermediate_size=64 if tiny else 14336,
        max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip


def shapes(name: str, tiny: bool = False) -> list[tuple[int, ...]]:
    """Shapes of the trainable tensors, in order, tied ones once."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config(name, tiny))  # type: ignore[no-untyped-call]
    return [tuple(p.shape) for p in model.parameters()]


def build(name: str, device: str, tiny: bool = False) -> nn.Module:
    """The model in bfloat16 with random weights of standard deviation 0.02, in eval mode."""
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(config(name, tiny), dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    generator = torch.Generator(device).manual_seed(0)
    for p in model.parameters():
        if p.ndim > 1:
            p.data.normal_(0, 0.02, generator=generator)
    return model.eval()


def batch(model: Any, size: int, length: int) -> Tensor:
    """Random token ids."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(1)
    return torch.randint(3, int(model.config.vocab_size), (size, length), generator=generator, device=device)
