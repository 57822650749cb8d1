"""Several processes: each evaluates its part of the batch, its share of the probes, or forwards with its shard of the weights.

torchrun --nproc-per-node 4 examples/distributed.py              # parts of each batch; a tiny random model, offline
torchrun --nproc-per-node 4 examples/distributed.py --parts 1    # all of it in each, and a fourth of the probes
torchrun --nproc-per-node 4 examples/distributed.py --parts 2    # both
torchrun --nproc-per-node 3 examples/distributed.py --shard      # weights sharded by FSDP2
accelerate launch --num_processes 4 examples/distributed.py --model HuggingFaceTB/SmolLM2-135M-Instruct --lr 1e-5
"""

import argparse
import os

import torch
from tiny import collate, encode, load, reviews
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard

import zo_core
from zo_core.distributed import Parallel


def main() -> None:
    """Train; the first rank prints."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model")
    options.add_argument("--lr", type=float, default=3e-3)
    options.add_argument("--steps", type=int, default=50)
    options.add_argument("--batch", type=int, default=24)
    options.add_argument("--parts", type=int, help="parts of a batch; default: one a process")
    options.add_argument("--shard", action="store_true")
    given = options.parse_args()

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group()
    say = print if dist.get_rank() == 0 else lambda *text: None

    model, tokenizer = load(given.model)
    model.to(device)
    if given.shard:
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
    parallel = Parallel(data=given.parts)
    opt = zo_core.FZOO(model, lr=given.lr, probes=8, processes=parallel)

    data = encode(tokenizer, reviews())[:192]
    for step in range(given.steps):
        epoch, first = divmod(step * given.batch, len(data) - len(data) % given.batch)
        rows = zo_core.noise.permutation(len(data), seed=0, stream=epoch)[first : first + given.batch]
        mine = rows[parallel.part :: parallel.parts].tolist()  # parts of one size
        batch = {k: v.to(device) for k, v in collate([data[i] for i in mine]).items()}
        loss = opt.step(lambda batch=batch: model(**batch).loss)
        if step % 10 == 0 or step == given.steps - 1:
            say(f"step {step}: loss {float(loss):.3f}, {opt.exchanged['step']} bytes exchanged")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    say(
        f"{opt.updates} updates of {size / 1e6:.1f} MB of weights, {opt.exchanged['all']} bytes exchanged by each process"
    )
    opt.compare()
    say("weights and state of all processes agree")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
