"""Maximizes what no gradient exists of: the F1 of generated text against the answer, by MeZO as in its paper.

python examples/generation_objective.py                      # a tiny random model, offline
python examples/generation_objective.py --model HuggingFaceTB/SmolLM2-135M-Instruct --lr 1e-6 --eps 1e-3
"""

import argparse
import random
from collections import Counter
from typing import Any

from tiny import load, reviews
from transformers import PreTrainedModel

import zo_core


def f1(generated: str, answer: str) -> float:
    """Of the words of both texts."""
    ours, theirs = Counter(generated.split()), Counter(answer.split())
    return 2 * sum((ours & theirs).values()) / max(1, sum(ours.values()) + sum(theirs.values()))


def score(model: PreTrainedModel, tokenizer: Any, rows: list[tuple[str, str]]) -> float:
    """Mean F1 of greedily generated answers."""
    prompts = tokenizer([prompt for prompt, _ in rows], padding=True, padding_side="left", return_tensors="pt")
    tokens = model.generate(
        input_ids=prompts["input_ids"].to(model.device), attention_mask=prompts["attention_mask"].to(model.device),
        max_new_tokens=2, do_sample=False, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    texts = tokenizer.batch_decode(tokens[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(f1(text, answer) for text, (_, answer) in zip(texts, rows, strict=True)) / len(rows)


def main() -> None:
    """Train, and print the score of sentences that were not trained on, before and after."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model")
    options.add_argument("--lr", type=float, default=1e-2)
    options.add_argument("--eps", type=float, default=1e-2, help="large enough to change what is generated")
    options.add_argument("--steps", type=int, default=40)
    given = options.parse_args()

    model, tokenizer = load(given.model)
    model.eval()
    rows, order = reviews(), random.Random(0)
    optimizer = zo_core.MeZO(model, lr=given.lr, eps=given.eps, probes=8)
    before = score(model, tokenizer, rows[192:])
    for _ in range(given.steps):
        batch = order.sample(rows[:192], 32)
        optimizer.step(lambda batch=batch: 1 - score(model, tokenizer, batch))
    print(f"F1 {before:.3f} -> {score(model, tokenizer, rows[192:]):.3f}")


if __name__ == "__main__":
    main()
