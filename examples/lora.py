"""Fine-tunes PEFT's LoRA with transformers' Trainer and no backward, at MeZO's published learning rate and eps for LoRA.

python examples/lora.py                                      # a tiny random model, offline
python examples/lora.py --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse

from peft import LoraConfig, get_peft_model
from tiny import collate, encode, load, reviews

from zo_core.integrations.transformers import ZOTrainer, ZOTrainingArguments


def main() -> None:
    """Train, and save the adapters."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model")
    options.add_argument("--lr", type=float, help="default: what is published, 1e-4 with eps 1e-2")
    options.add_argument("--steps", type=int, default=100)
    options.add_argument("--output", default="runs/lora")
    given = options.parse_args()

    base, tokenizer = load(given.model)
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    data = encode(tokenizer, reviews())
    arguments = ZOTrainingArguments(
        output_dir=given.output,
        learning_rate=given.lr,
        max_steps=given.steps,
        per_device_train_batch_size=16,
        logging_steps=20,
        report_to=[],
    )
    trainer = ZOTrainer(model, arguments, train_dataset=data[:192], eval_dataset=data[192:], data_collator=collate)
    trainer.train()
    print(trainer.evaluate(), trainer.zo_optimizer.defaults["lr"])
    model.save_pretrained(given.output)


if __name__ == "__main__":
    main()
