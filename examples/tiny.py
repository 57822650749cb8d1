"""What the examples share: a tiny random language model with a tokenizer of words, and sentences with a word to predict."""

import re
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

WORDS = {" good": ("good", "fine", "great", "lovely"), " bad": ("awful", "sad", "poor", "boring")}
NOUNS = ("film", "plot", "cast", "story", "ending", "scene", "score", "script")


def load(name: str | None, seed: int = 0) -> tuple[PreTrainedModel, Any]:
    """A model and its tokenizer: of this name or folder, or tiny, random and made here."""
    if name:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return model, tokenizer
    words = sorted({word for row in reviews() for word in re.findall(r"\w+|[^\w\s]+", " ".join(row))})
    vocabulary = {word: i for i, word in enumerate(["<eos>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **sizes, **ends)), tokenizer


def reviews() -> list[tuple[str, str]]:
    """256 prompts, each with the word that belongs after it; the last 64 are for evaluation."""
    return [
        (f"a {noun} {end}: {word} ->", label)
        for end in ("today", "again", "twice", "tonight")
        for noun in NOUNS
        for pair in zip(*WORDS.values(), strict=True)
        for word, label in zip(pair, WORDS, strict=True)
    ]


def encode(tokenizer: Any, rows: list[tuple[str, str]]) -> list[dict[str, list[int]]]:
    """Tokens of prompt and answer; labels are those of the answer."""
    pairs = [(tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]) for prompt, answer in rows]
    return [{"input_ids": p + a, "labels": [-100] * len(p) + a} for p, a in pairs]


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """One batch, padded on the right."""
    width = max(len(row["input_ids"]) for row in rows)
    pads = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {k: torch.tensor([row[k] + [pad] * (width - len(row[k])) for row in rows]) for k, pad in pads.items()}
