"""The job of test_hf_trainer.py: Trainer on four ranks, as one mesh and as two meshes of two ranks; and its errors.

python -m tests.launch.trainers.hf_trainer_job FOLDER    # under torchrun; each rank writes its results into FOLDER
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


def make_sequences(num_sequences, rows=SEQ_LEN, seed=0):
    """Make sequences with uneven numbers of labels, and padding at their ends."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for n in range(num_sequences):
        tokens = torch.randint(50, (rows,), generator=generator)
        valid = torch.arange(rows) < (rows - 11 * n % rows)
        samples.append({"input_ids": tokens, "labels": tokens.where(valid, -100), "attention_mask": valid.long()})
    return samples


def make_trainer(
    folder, mesh=None, trainer_class=DilatedTrainer, num_meshes=1, num_sequences=13, rows=SEQ_LEN, **options
):
    """Make a trainer with two sequences per forward over all meshes; with 13 sequences the last batch is ragged."""
    defaults = {"max_steps": STEPS, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2, "disable_tqdm": True}
    defaults |= {"gradient_accumulation_steps": 2, "use_cpu": True, "ddp_find_unused_parameters": False, "seed": 7}
    defaults |= dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), 2 // num_meshes)
    held_out = make_sequences(num_sequences // 2 + num_sequences % 2, rows, seed=1)
    data = {"train_dataset": make_sequences(num_sequences, rows), "eval_dataset": held_out}
    trainer_options = {} if trainer_class is Trainer else {"mesh": mesh}
    trainer_options |= {name: options.pop(name) for name in ("compute_metrics", "compute_loss_func") if name in options}
    model = options.pop("model", None) or make_model(mesh)
    return trainer_class(model, TrainingArguments(str(folder), **(defaults | options)), **data, **trainer_options)


def train(folder, *args, **options):
    """Evaluate, train, evaluate, and resume from the middle; return results that must equal those of one process."""
    first = make_trainer(folder, *args, **options)
    loss_before = first.evaluate()["eval_loss"]
    first.train()
    resumed = make_trainer(folder, *args, **options)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{STEPS // 2}")
    assert resumed.state.global_step == STEPS
    pairs = zip(first.model.named_parameters(), resumed.model.parameters(), strict=True)
    for (name, a), b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=lambda text, name=name: f"resumed, {name}: {text}")
    logs = [log for log in first.state.log_history if "loss" in log]
    return {
        "losses": [log["loss"] for log in logs],
        "gradient norms": [log["grad_norm"] for log in logs],
        "eval losses": [loss_before, first.evaluate()["eval_loss"]],
        "amounts": [first.state.epoch, first.state.total_flos, first.get_total_train_batch_size(first.args)],
        "parameters": torch.cat([p.detach().flatten() for p in first.model.parameters()]).tolist(),
    }


def losses_in_float32(folder, mesh, trainer_class=DilatedTrainer, **options):
    """Return the losses of a float32 model, computed in bfloat16 with `bf16=True`."""
    model = apply(make_model().float(), PATTERN, mesh)
    trainer = make_trainer(folder, mesh, trainer_class, model=model, **options)
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def losses_of_packed(folder, mesh):
    """Return the losses of documents of 4 to 26 tokens, three of which a collator packs into each sequence of 45."""
    from transformers import DataCollatorWithFlattening

    generator = torch.Generator().manual_seed(5)
    samples = []
    for _ in range(8):
        for length in (4, 15, 26):
            tokens = torch.randint(50, (length,), generator=generator).tolist()
            samples.append({"input_ids": tokens, "labels": tokens})
    options = {"per_device_train_batch_size": 3, "train_sampling_strategy": "sequential", "eval_strategy": "no"}
    trainer = make_trainer(folder, mesh, **options)
    trainer.train_dataset, trainer.data_collator = samples, DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def errors(folder, mesh):
    """Return the error of each wrong use by the expected message. Every rank must raise, and none may hang."""
    rank = dist.get_rank()

    def error_of(call):
        try:
            call()
        except ValueError as error:
            return str(error)
        return "no error"

    halves = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))["sp"]
    half = SequenceMesh(halves, PATTERN, SEQ_LEN)
    different_data = make_trainer(folder, mesh)
    different_data.train_dataset = make_sequences(13, seed=rank)
    different_length = make_trainer(folder, mesh)
    different_length.train_dataset = make_sequences(13 + 8 * rank)
    short_in_one_mesh = make_trainer(folder, half, num_meshes=2, num_sequences=12)
    short_in_one_mesh.train_dataset = make_sequences(12, rows=SEQ_LEN - (rank > 1))
    padded_in_one_mesh = make_trainer(folder, half, num_meshes=2, num_sequences=12)
    padded_in_one_mesh.train_dataset = make_sequences(12)
    if rank > 1:
        for sequence in padded_in_one_mesh.train_dataset:
            sequence["attention_mask"][1] = 0
    without_ddp = make_trainer(folder, mesh)
    without_ddp.evaluate()
    return {
        "the ranks of one sequence disagree, and every rank must pass the same: seed": error_of(
            lambda: make_trainer(folder, mesh, seed=rank)
        ),
        "the ranks of a sequence have different batches": error_of(different_data.train),
        "number of batches": error_of(different_length.train),
        "the batch is of 44 tokens, and the mesh of seq_len = 45": error_of(short_in_one_mesh.train),
        "padding between the tokens of a document": error_of(padded_in_one_mesh.train),
        "the model was applied with the mesh": error_of(lambda: make_trainer(folder, mesh, model=make_model(half))),
        "the meshes are over the ranks (0, 1), (2,), (3,): every rank of the job": error_of(
            lambda: make_trainer(folder, half if rank < 2 else None)
        ),
        "the model is not in DDP": error_of(lambda: Trainer.train(without_ddp)),
        "predict() is not supported": error_of(lambda: make_trainer(folder, mesh).predict(make_sequences(2))),
    }


def main():
    folder = Path(sys.argv[1])
    TrainingArguments(str(folder), use_cpu=True)
    whole = SequenceMesh(dist.group.WORLD, PATTERN, SEQ_LEN)
    half = SequenceMesh(init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))["sp"], PATTERN, SEQ_LEN)
    results = {
        "one mesh": train(folder / "one", whole),
        "two meshes": train(folder / "two", half, num_meshes=2, num_sequences=12),
        "bfloat16": losses_in_float32(folder / "bfloat16", whole, bf16=True),
        "packed": losses_of_packed(folder / "packed", whole),
        "errors": errors(folder / "errors", whole),
    }
    torch.save(results, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
