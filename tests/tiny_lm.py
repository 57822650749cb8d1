"""A language model small enough for tests: a byte-level tokenizer trained on a few words, random weights."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = "good fine great happy lovely bad awful sad terrible boring".split()
NOUNS = "film plot cast story ending scene score script pace idea".split()


def rows(n: int = 120) -> list[tuple[str, str]]:
    """n different (text, label) rows, half of each label; one word in the text decides it."""
    texts = [f"a {w} {a} and {b}" for a in NOUNS for b in NOUNS if a != b for w in WORDS]
    labels = ["positive" if i % 10 < 5 else "negative" for i in range(len(texts))]
    return list(zip(texts, labels, strict=True))[:n]


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and merges of the words in `rows` and the default prompt; no BOS, as SmolLM2."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    corpus = [f"Review: {text}\nSentiment: {label}" for text, label in rows(400)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=["<bos>"], show_progress=False
    )
    core.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<bos>")


def save(folder: Path, kind: str = "llama") -> Path:
    """Write a tiny Llama (tied) or GPT-2 (with dropout) and its tokenizer as `from_pretrained` wants them."""
    words = tokenizer()
    if kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(words),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=128,
                tie_word_embeddings=True,
                pad_token_id=None,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(words),
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=128,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.1, generator=generator)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
