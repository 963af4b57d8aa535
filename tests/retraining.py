"""A task, sparse networks with adapters, and a fit, for tests of retraining."""

import lightning as L
import torch
from peft import get_peft_model

from lightning_prune import lora
from lightning_prune.targets import select
from tests.lora_networks import config, network

STEPS = 6


class Task(L.LightningModule):
    """A network, random tokens, and labels to tell."""

    def __init__(self, model, rate=0.05):
        super().__init__()
        self.model, self.rate = model.train(), rate
        for module in self.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0

    def training_step(self, batch, index):
        tokens, labels = batch
        out = self.model(input_ids=tokens)
        logits = out.logits if out.logits.dim() == 2 else out.logits[:, -1]
        return torch.nn.functional.cross_entropy(logits, labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.rate, weight_decay=0.1)

    def train_dataloader(self):
        draw = torch.Generator().manual_seed(5)
        tokens = torch.randint(3, 20, (STEPS * 4, 7), generator=draw)
        labels = torch.randint(0, 3, (STEPS * 4,), generator=draw)
        data = torch.utils.data.TensorDataset(tokens, labels)
        return torch.utils.data.DataLoader(data, batch_size=4)


def sparse(name="bert", seed=0):
    """A network whose selected weights are half zeros."""
    net = network(name, seed)
    draw = torch.Generator().manual_seed(1)
    for target in select(net).targets:
        mask = torch.rand(target.shape, generator=draw) < 0.5
        target.parameter.data.mul_(mask)
    return net


def wrapped(name="bert", **settings):
    torch.manual_seed(2)
    return get_peft_model(sparse(name), config(name, r=2, **settings))


def fit(task, *callbacks, **settings):
    trainer = L.Trainer(
        max_epochs=settings.pop("max_epochs", 1),
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **settings,
    )
    trainer.fit(task)
    return trainer


def zeros(model):
    """Where selected weights are zero, by their plain names."""
    return {
        lora.plain_name(t.name): t.parameter.detach() == 0
        for t in select(model, frozen=True).targets
    }


def moved(before, after):
    """Names of parameters that changed."""
    return {n for n, p in after.items() if not torch.equal(p, before[n])}


def values(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}
