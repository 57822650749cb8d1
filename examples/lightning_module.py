"""Lightning with manual optimization: the step evaluates the loss itself, and there is no backward.

python examples/lightning_module.py                          # a tiny random model, offline
python examples/lightning_module.py --model HuggingFaceTB/SmolLM2-135M-Instruct --lr 1e-6
"""

import argparse

import lightning
import torch
from tiny import collate, encode, load, reviews
from torch import Tensor

import zo_core


class ZeroOrder(lightning.LightningModule):
    """A language model that is trained by MeZO."""

    def __init__(self, name: str | None, lr: float) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.tokenizer = load(name)
        self.model.train()
        self.lr = lr

    def training_step(self, batch: dict[str, Tensor], number: int) -> None:
        """One step of the optimizer."""
        loss = self.optimizers().step(lambda: self.model(**batch).loss)
        self.log("loss", loss, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """MeZO over the model."""
        return zo_core.MeZO(self.model, lr=self.lr, distribution="rademacher", probes=2)


def main() -> None:
    """Train for some epochs."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model")
    options.add_argument("--lr", type=float, default=3e-3)
    options.add_argument("--epochs", type=int, default=5)
    options.add_argument("--output", default="runs/lightning")
    options.add_argument("--resume", help="a checkpoint")
    given = options.parse_args()

    lightning.seed_everything(0)
    module = ZeroOrder(given.model, given.lr)
    data = encode(module.tokenizer, reviews())[:192]
    loader = torch.utils.data.DataLoader(data, batch_size=16, collate_fn=collate)
    trainer = lightning.Trainer(
        max_epochs=given.epochs, default_root_dir=given.output, logger=False, accelerator="auto", devices=1
    )
    trainer.fit(module, loader, ckpt_path=given.resume)
    trainer.save_checkpoint(f"{given.output}/last.ckpt")
    print(f"loss {float(trainer.callback_metrics['loss']):.3f} after {trainer.global_step} steps")


if __name__ == "__main__":
    main()
