"""A training loop of one's own, with accelerate: prepared model and data, checkpoints with the optimizer's state.

python examples/accelerate_loop.py                           # a tiny random model, offline
accelerate launch --num_processes 2 examples/accelerate_loop.py --model HuggingFaceTB/SmolLM2-135M-Instruct --lr 1e-6
"""

import argparse

import torch
from accelerate import Accelerator
from tiny import collate, encode, load, reviews

import zo_core
from zo_core.distributed import Parallel


def main() -> None:
    """Train for some epochs, and save all of it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model")
    options.add_argument("--lr", type=float, default=3e-3)
    options.add_argument("--epochs", type=int, default=5)
    options.add_argument("--output", default="runs/accelerate")
    given = options.parse_args()

    model, tokenizer = load(given.model)
    data = encode(tokenizer, reviews())[:192]
    order = torch.Generator().manual_seed(0)
    loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True, collate_fn=collate, generator=order)

    accelerator = Accelerator()
    model = accelerator.prepare_model(model, evaluation_mode=True)  # not in DDP, which is for gradients
    loader = accelerator.prepare(loader)
    processes = Parallel() if accelerator.num_processes > 1 else None
    optimizer = zo_core.MeZO(  # of the model where it is now
        model, lr=given.lr, distribution="rademacher", probes=2, processes=processes
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=given.epochs * len(loader))
    accelerator.register_for_checkpointing(optimizer, schedule)

    for epoch in range(given.epochs):
        for batch in loader:
            loss = optimizer.step(lambda batch=batch: model(**batch).loss)
            schedule.step()
        accelerator.print(f"epoch {epoch}: loss {float(loss):.3f}")
    accelerator.save_state(given.output)


if __name__ == "__main__":
    main()
