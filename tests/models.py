"""Tiny random models of the architectures that engines are held against, with a loss for each."""

from collections.abc import Callable

import torch
import transformers as hf
from torch import Tensor, nn

IDS = torch.arange(1, 25).view(2, 12) % 61
SMALL = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
END = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {**SMALL, **END, "num_key_value_heads": 1, "head_dim": 8}


class Nested(nn.Module):
    """Tied weights, a shared module called twice, one never called, parameters of its own read while children run."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, 16, padding_idx=0)
        self.twice = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
        self.again = self.twice[0]
        self.never = nn.Linear(16, 3)
        self.gain = nn.Parameter(torch.ones(16))
        self.cube = nn.Parameter(torch.randn(3, 16, 16) * 0.2)
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 61, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = self.twice(x) + self.again(self.twice(x) * self.gain)
        x = x @ self.cube[0] + torch.einsum("btd,ed->bte", x, self.cube[2])
        x = x + self.attend(x, x, x, need_weights=False)[0]
        return self.head(self.norm(x))


class Recurrent(nn.Module):
    """An LSTM keeps its weights in a list beside its attributes; a head is read as an extension in C++ would."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, 16)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, 61)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.lstm(self.embed(ids))[0]
        with torch._C.DisableTorchFunctionSubclass():
            return self.head(x)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**SMALL, **END, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32, dropout=0.2)
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=32, **END)
    ),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL, max_position_embeddings=32)),
    "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**SMALL, max_position_embeddings=32)),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=61, d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2, decoder_start_token_id=0)
    ),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GROUPED)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPED, num_local_experts=4)),
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2, state_size=4)
    ),
    "nested": Nested,
    "recurrent": Recurrent,
}
MORE = {  # that only some tests take
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**SMALL, **END, num_key_value_heads=1)),
    "neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL, **END, max_position_embeddings=32)),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A model and the loss of one batch."""
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        model = {**ARCHITECTURES, **MORE}[name]().to(dtype).eval()

    def loss() -> Tensor:
        if isinstance(model, Nested | Recurrent):
            logits = model(IDS)
            return nn.functional.cross_entropy(logits.flatten(0, 1).float(), IDS.flatten())
        labels = torch.tensor([0, 1]) if name == "roberta" else IDS
        return model(input_ids=IDS, labels=labels).loss.float()

    return model, loss
