"""Trainer over four ranks, as one mesh and as two of two ranks; and what it refuses there. Under torchrun.

python -m tests.launch.hf_trainer_job FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from longnet_dist import Pattern, SequenceMesh
from longnet_dist.integrations.hf_trainer import DilatedTrainer
from longnet_dist.integrations.transformers import apply

SEQ_LEN, PATTERN, STEPS = 45, Pattern((8, 48), (1, 4)), 4


def make_model(mesh=None):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    return apply(LlamaForCausalLM(config).double(), PATTERN, mesh)


def sequences(number, rows=SEQ_LEN, seed=0):
    """Of uneven numbers of labels, with padding at their ends."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for n in range(number):
        tokens = torch.randint(50, (rows,), generator=generator)
        there = torch.arange(rows) < (rows - 11 * n % rows)
        made.append({"input_ids": tokens, "labels": tokens.where(there, -100), "attention_mask": there.long()})
    return made


def make(folder, mesh=None, kind=DilatedTrainer, dp=1, number=13, rows=SEQ_LEN, **options):
    """A trainer of two sequences a forward over all meshes; of those in `number`, some only in a last, ragged batch."""
    given = {"max_steps": STEPS, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2, "disable_tqdm": True}
    given |= {"gradient_accumulation_steps": 2, "use_cpu": True, "ddp_find_unused_parameters": False, "seed": 7}
    given |= {"per_device_train_batch_size": 2 // dp, "per_device_eval_batch_size": 2 // dp}
    data = {"train_dataset": sequences(number, rows), "eval_dataset": sequences(number // 2 + number % 2, rows, seed=1)}
    of_trainer = {} if kind is Trainer else {"mesh": mesh}
    of_trainer |= {name: options.pop(name) for name in ("compute_metrics", "compute_loss_func") if name in options}
    model = options.pop("model", None) or make_model(mesh)
    return kind(model, TrainingArguments(str(folder), **(given | options)), **data, **of_trainer)


def train(folder, *args, **options):
    """What of a run is as on one process: it evaluates, trains, evaluates, and is resumed from its middle."""
    first = make(folder, *args, **options)
    before = first.evaluate()["eval_loss"]
    first.train()
    resumed = make(folder, *args, **options)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{STEPS // 2}")
    assert resumed.state.global_step == STEPS
    pairs = zip(first.model.named_parameters(), resumed.model.parameters(), strict=True)
    for (name, a), b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=lambda said, name=name: f"resumed, {name}: {said}")
    logs = [log for log in first.state.log_history if "loss" in log]
    return {
        "losses": [log["loss"] for log in logs],
        "gradient norms": [log["grad_norm"] for log in logs],
        "eval losses": [before, first.evaluate()["eval_loss"]],
        "amounts": [first.state.epoch, first.state.total_flos, first.get_total_train_batch_size(first.args)],
        "parameters": torch.cat([p.detach().flatten() for p in first.model.parameters()]).tolist(),
    }


def refusals(folder, mesh):
    """Each is said on every rank, and none hangs."""
    rank = dist.get_rank()

    def said(work):
        try:
            work()
        except ValueError as error:
            return str(error)
        return "nothing"

    halves = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))["sp"]
    half = SequenceMesh(halves, PATTERN, SEQ_LEN)
    by_rank = make(folder, mesh)
    by_rank.train_dataset = sequences(13, seed=rank)
    longer = make(folder, mesh)
    longer.train_dataset = sequences(13 + 8 * rank)
    one_short = make(folder, half, dp=2, number=12)
    one_short.train_dataset = sequences(12, rows=SEQ_LEN - (rank > 1))
    padded = make(folder, half, dp=2, number=12)
    padded.train_dataset = sequences(12)
    if rank > 1:  # One mesh alone.
        for sequence in padded.train_dataset:
            sequence["attention_mask"] = sequence["attention_mask"].flip(0).clone()
            sequence["attention_mask"][0] = 0
    bare = make(folder, mesh)
    bare.evaluate()
    return {
        "the ranks of one sequence disagree, and every rank must pass the same: seed": said(
            lambda: make(folder, mesh, seed=rank)
        ),
        "the ranks of a sequence were given different batches": said(by_rank.train),
        "number of batches": said(longer.train),
        "the batch is of 44 tokens, and the mesh of seq_len = 45": said(one_short.train),
        "padding before tokens": said(padded.train),
        "the model was applied with the mesh": said(lambda: make(folder, mesh, model=make_model(half))),
        "the meshes are over the ranks (0, 1), (2,), (3,): every rank of the job": said(
            lambda: make(folder, half if rank < 2 else None)
        ),
        "the model is not in DDP": said(lambda: Trainer.train(bare)),
        "predict() is not supported": said(lambda: make(folder, mesh).predict(sequences(2))),
    }


def main():
    folder = Path(sys.argv[1])
    TrainingArguments(str(folder), use_cpu=True)
    whole = SequenceMesh(dist.group.WORLD, PATTERN, SEQ_LEN)
    half = SequenceMesh(init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))["sp"], PATTERN, SEQ_LEN)
    found = {"one mesh": train(folder / "one", whole), "two meshes": train(folder / "two", half, dp=2, number=12)}
    found["refusals"] = refusals(folder / "refused", whole)
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
