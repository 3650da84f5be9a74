"""The job of test_lightning.py: many small fits, on two or four ranks.

python -m tests.launch.trainers.lightning_job FOLDER    # under torchrun; each rank writes its results into FOLDER
"""

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
from tests.launch.trainers.test_lightning import CLIP, CONFIG, DOCUMENTS, N, make_sequences


class Language(LightningModule):
    """The module that a user writes, with the one mistake that `case` names."""

    def __init__(self, weighting, case):
        super().__init__()
        self.weighting, self.case, self.model, self.losses = weighting, case, None, []
        self.automatic_optimization = weighting != "manual"
        if case == "parameters":
            self.extra = torch.nn.Parameter(torch.full((3,), float(dist.get_rank())))

    def configure_model(self):
        if self.model is not None:
            return
        self.mesh = sequence_mesh(self, CONFIG.pattern, N)
        self.model = CONFIG.build(dtype=torch.float64)
        mesh = self.device_mesh["tensor_parallel"] if self.case == "half" else self.device_mesh
        for part in (*self.model.blocks, *([] if self.case == "unsharded" else [self.model])):
            fully_shard(part, mesh=mesh)

    def loss(self, batch):
        tokens, targets = (batch[name] if self.case == "unsplit" else self.mesh.split(batch[name]) for name in batch)
        if self.case == "local loss":
            return torch.nn.functional.cross_entropy(self.model(tokens, self.mesh).flatten(0, 1), targets.flatten())
        return self.model(tokens, self.mesh, targets, DOCUMENTS if self.case == "packed" else None)

    def training_step(self, batch, index):
        loss, count = self.loss(batch), int((batch["targets"] != -100).sum())
        self.losses.append((loss.item(), count))
        self.log("loss", loss, on_epoch=True, on_step=False, sync_dist=True)
        if self.weighting == "manual":
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
            return {"tokens": count} if self.case == "manual tokens" else None
        if self.weighting == "by batch" or (self.case == "some tokens" and index == 1):
            return loss
        if self.case == "local tokens":
            count = int((self.mesh.split(batch["targets"]) != -100).sum())
        if self.case == "one token more":
            count = 1_000_000 + dist.get_rank()
        return {"loss": loss, "tokens": count}

    def validation_step(self, batch, index):
        self.log("validation", self.loss(batch), sync_dist=True, batch_size=1)

    def test_step(self, batch, index):
        self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def fit(
    case="", weighting="by token", groups=1, loader=None, held_out=None, strategy=None, path=None, seed=0, **options
):
    """Fit for two epochs of five batches, and return (module, trainer)."""
    seed_everything(seed)
    model = Language(weighting, case)
    if weighting != "manual":
        options |= {"accumulate_grad_batches": 2, "gradient_clip_val": CLIP if weighting == "by token" else None}
    trainer = Trainer(
        accelerator="cpu", devices=dist.get_world_size(), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        strategy=strategy or SequenceParallelStrategy(data_parallel_size=groups), **({"max_epochs": 2} | options),
    )  # fmt: skip
    loader = loader or DataLoader(make_sequences(), batch_size=2 // groups)
    held_out = held_out or DataLoader(make_sequences(4), batch_size=2 // groups)
    if case == "test":
        trainer.test(model, held_out)
    else:
        trainer.fit(model, loader, held_out, ckpt_path=path)
    return model, trainer


def losses_of_fits(groups):
    model, trainer = fit(groups=groups)
    results = {
        "by token": model.losses,
        "logged": trainer.callback_metrics["loss"].item(),
        "validated": trainer.callback_metrics["validation"].item(),
    }
    again = trainer.validate(model, DataLoader(make_sequences(4), batch_size=2 // groups), verbose=False)
    results["validated again"] = again[0]["validation"]
    if groups == 1:
        results["by batch"] = fit(weighting="by batch")[0].losses
        results["packed"] = fit("packed", weighting="by batch")[0].losses
        results["manual"] = fit(weighting="manual")[0].losses
    return results


def losses_after_resuming(folder, groups):
    """Return the losses of the second epoch, from a checkpoint that two ranks wrote after the first."""
    results = {}
    for layout in ("folder", "file"):
        options = {"save_distributed_checkpoint": layout == "folder", "data_parallel_size": groups}
        path = folder / layout
        if groups == 1:
            _, trainer = fit(max_epochs=1, strategy=SequenceParallelStrategy(**options))
            trainer.save_checkpoint(path)
        strategy = SequenceParallelStrategy(**options)
        results[f"from a {layout}"] = fit(path=path, groups=groups, strategy=strategy)[0].losses
    return results


def error_of(case="", **options):
    """Return the error that a fit raises."""
    try:
        fit(case, **options)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def sampled_per_rank():
    """Make a loader whose sampler gives every rank samples of its own."""
    return DataLoader(make_sequences(), batch_size=1, sampler=DistributedSampler(make_sequences()))


def longer_from(first):
    """Make a loader with two more batches on the ranks from `first` on."""
    return DataLoader(make_sequences(4 + 2 * (dist.get_rank() >= first)), batch_size=1)


def errors(groups):
    rank = dist.get_rank()
    if groups == 2:
        return {
            "same": error_of(groups=2, use_distributed_sampler=False),
            "half": error_of("half", groups=2),
            "sizes": error_of(strategy=SequenceParallelStrategy(data_parallel_size=3)),
            "sampler": error_of(groups=2, loader=sampled_per_rank()),
            "seeds": error_of(groups=2, seed=rank // 2),
            "number": error_of(groups=2, loader=longer_from(2)),
        }
    return {
        "ddp": error_of(strategy=DDPStrategy()),
        "plain": error_of(strategy=ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)),
        "seeds": error_of(seed=rank),
        "parameters": error_of("parameters"),
        "sampler": error_of(loader=sampled_per_rank()),
        "number": error_of(loader=longer_from(1)),
        "number to validate": error_of(held_out=longer_from(1)),
        "number to test": error_of("test", held_out=longer_from(1)),
        "unsharded": error_of("unsharded"),
        "unsplit": error_of("unsplit"),
        "length": error_of(loader=DataLoader(make_sequences(rows=60), batch_size=2)),
        "local tokens": error_of("local tokens"),
        "some tokens": error_of("some tokens"),
        "one token more": error_of("one token more"),
        "local loss": error_of("local loss", weighting="by batch"),
        "manual tokens": error_of("manual tokens", weighting="manual"),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    groups = dist.get_world_size() // 2
    results = {**losses_of_fits(groups), **losses_after_resuming(folder, groups), "errors": errors(groups)}
    (folder / f"{groups}-{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
