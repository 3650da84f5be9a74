"""The job of test_lightning.py: many small fits on the ranks that there are; each rank writes down what it saw."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from longnet_dist.integrations.lightning import SequenceParallelStrategy, sequence_mesh
from tests.launch.test_lightning import CLIP, CONFIG, N, data


class Language(LightningModule):
    """What a user writes; each case of the tests spoils one thing."""

    def __init__(self, weigh, case):
        super().__init__()
        self.weigh, self.case, self.model, self.seen = weigh, case, None, []
        self.automatic_optimization = weigh != "manual"
        if case == "parameters":
            self.extra = torch.nn.Parameter(torch.full((3,), float(dist.get_rank())))

    def configure_model(self):
        if self.model is not None:
            return
        self.mesh = sequence_mesh(self, CONFIG.pattern, N)
        self.model = CONFIG.build(dtype=torch.float64)
        over = self.device_mesh["tensor_parallel"] if self.case == "half" else self.device_mesh
        for part in (*self.model.blocks, *([] if self.case == "loose" else [self.model])):
            fully_shard(part, mesh=over)

    def loss(self, batch):
        tokens, labels = (batch[name] if self.case == "unsplit" else self.mesh.split(batch[name]) for name in batch)
        if self.case == "local loss":
            return torch.nn.functional.cross_entropy(self.model(tokens, self.mesh).flatten(0, 1), labels.flatten())
        return self.model(tokens, self.mesh, labels)

    def training_step(self, batch, index):
        loss, count = self.loss(batch), int((batch["labels"] != -100).sum())
        self.seen.append((loss.item(), count))
        self.log("loss", loss, on_epoch=True, on_step=False, sync_dist=True)
        if self.weigh == "manual":
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
            return {"tokens": count} if self.case == "manual tokens" else None
        if self.weigh == "by batch" or (self.case == "some tokens" and index == 1):
            return loss
        if self.case == "local tokens":
            count = int((self.mesh.split(batch["labels"]) != -100).sum())
        if self.case == "one token more":
            count = 1_000_000 + dist.get_rank()
        return {"loss": loss, "tokens": count}

    def validation_step(self, batch, index):
        self.log("validation", self.loss(batch), sync_dist=True, batch_size=1)

    def test_step(self, batch, index):
        self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def fit(case="", weigh="by token", groups=1, loader=None, held_out=None, strategy=None, path=None, seed=0, **options):
    """(module, trainer) after a fit of two epochs of five batches."""
    seed_everything(seed)
    model = Language(weigh, case)
    if weigh != "manual":
        options |= {"accumulate_grad_batches": 2, "gradient_clip_val": CLIP if weigh == "by token" else None}
    trainer = Trainer(
        accelerator="cpu", devices=dist.get_world_size(), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        strategy=strategy or SequenceParallelStrategy(data_parallel_size=groups), **({"max_epochs": 2} | options),
    )  # fmt: skip
    loader = loader or DataLoader(data(), batch_size=2 // groups)
    held_out = held_out or DataLoader(data(4), batch_size=2 // groups)
    if case == "test":
        trainer.test(model, held_out)
    else:
        trainer.fit(model, loader, held_out, ckpt_path=path)
    return model, trainer


def curves(groups):
    model, trainer = fit(groups=groups)
    found = {"by token": model.seen, "logged": trainer.callback_metrics["loss"].item()}
    found["validated"] = trainer.callback_metrics["validation"].item()
    again = trainer.validate(model, DataLoader(data(4), batch_size=2 // groups), verbose=False)
    found["validated again"] = again[0]["validation"]
    if groups == 1:
        found["by batch"] = fit(weigh="by batch")[0].seen
        found["manual"] = fit(weigh="manual")[0].seen
    return found


def resumed(folder, groups):
    """Losses of the second epoch, from a checkpoint of the first by two ranks."""
    found = {}
    for kind in ("folder", "file"):
        options = {"save_distributed_checkpoint": kind == "folder", "data_parallel_size": groups}
        path = folder / kind
        if groups == 1:
            _, trainer = fit(max_epochs=1, strategy=SequenceParallelStrategy(**options))
            trainer.save_checkpoint(path)
        found[f"from a {kind}"] = fit(path=path, groups=groups, strategy=SequenceParallelStrategy(**options))[0].seen
    return found


def refused(case="", **options):
    """What the fit said."""
    try:
        fit(case, **options)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def sampled():
    """By a sampler that takes every rank for one with samples of its own."""
    return DataLoader(data(), batch_size=1, sampler=DistributedSampler(data()))


def uneven(first):
    return DataLoader(data(4 + 2 * (dist.get_rank() >= first)), batch_size=1)


def refusals(groups):
    rank = dist.get_rank()
    if groups == 2:
        return {
            "same": refused(groups=2, use_distributed_sampler=False),
            "half": refused("half", groups=2),
            "sizes": refused(strategy=SequenceParallelStrategy(data_parallel_size=3)),
            "sampler": refused(groups=2, loader=sampled()),
            "seeds": refused(groups=2, seed=rank // 2),
            "number": refused(groups=2, loader=uneven(2)),
        }
    return {
        "ddp": refused(strategy=DDPStrategy()),
        "plain": refused(strategy=ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)),
        "seeds": refused(seed=rank),
        "parameters": refused("parameters"),
        "sampler": refused(loader=sampled()),
        "number": refused(loader=uneven(1)),
        "number to validate": refused(held_out=uneven(1)),
        "number to test": refused("test", held_out=uneven(1)),
        "loose": refused("loose"),
        "unsplit": refused("unsplit"),
        "length": refused(loader=DataLoader(data(rows=60), batch_size=2)),
        "local tokens": refused("local tokens"),
        "some tokens": refused("some tokens"),
        "one token more": refused("one token more"),
        "local loss": refused("local loss", weigh="by batch"),
        "manual tokens": refused("manual tokens", weigh="manual"),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    groups = dist.get_world_size() // 2
    found = {**curves(groups), **resumed(folder, groups), "refused": refusals(groups)}
    (folder / f"{groups}-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
