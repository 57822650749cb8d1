"""Fine-tunes with transformers' Trainer and no backward: evaluation, checkpoints, and resuming where it was left.

python examples/trainer.py                                   # a tiny random model, offline
python examples/trainer.py --model HuggingFaceTB/SmolLM2-135M-Instruct --lr 1e-6
python examples/trainer.py --resume                          # after Ctrl-C or kill -9
"""

import argparse
import json
from pathlib import Path

from tiny import collate, encode, load, reviews
from torch import Tensor
from transformers import EvalPrediction

from zo_core.integrations.transformers import ZOTrainer, ZOTrainingArguments


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end: Trainer writes trainer_state.json last."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda p: -int(p.name.split("-")[1])):
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return str(path)
    return None


def best_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    """The likeliest next token everywhere: all that the metric needs."""
    return logits.argmax(-1)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """How many of the answers' tokens are the likeliest ones."""
    predicted, wanted = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    return {"accuracy": float((predicted == wanted)[wanted != -100].mean())}


def main() -> None:
    """Train, and save the model in OUTPUT/model."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model")
    options.add_argument("--method", default="MeZO")
    options.add_argument("--lr", type=float, default=3e-3)
    options.add_argument("--steps", type=int, default=400)
    options.add_argument("--output", type=Path, default=Path("runs/trainer"))
    options.add_argument("--resume", action="store_true")
    given = options.parse_args()

    model, tokenizer = load(given.model)
    data = encode(tokenizer, reviews())
    arguments = ZOTrainingArguments(
        output_dir=str(given.output),
        zo_method=given.method,
        distribution="rademacher",
        probes=2,
        learning_rate=given.lr,
        warmup_steps=5,
        max_steps=given.steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=20,
        save_steps=20,
        save_total_limit=3,
        logging_steps=20,
        report_to=[],
    )
    trainer = ZOTrainer(
        model,
        arguments,
        train_dataset=data[:192],
        eval_dataset=data[192:],
        data_collator=collate,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=best_tokens,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(given.output) if given.resume else None)
    print(trainer.evaluate(), f"{trainer.zo_optimizer.updates} updates")
    trainer.save_model(str(given.output / "model"))


if __name__ == "__main__":
    main()
