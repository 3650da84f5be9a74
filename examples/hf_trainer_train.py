"""Train with Hugging Face's Trainer and dilated attention, each sequence split across all ranks.

python examples/hf_trainer_train.py                                     # one process
torchrun --standalone --nproc-per-node 2 examples/hf_trainer_train.py   # two processes, with the same losses
accelerate launch --num_processes 2 --cpu examples/hf_trainer_train.py  # two processes, started by Accelerate
"""

from __future__ import annotations

import tempfile

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

from longnet_dist import Pattern, SequenceMesh
from longnet_dist.integrations.hf_trainer import DilatedTrainer
from longnet_dist.integrations.transformers import apply

SEQ_LEN, STEPS, MICRO_BATCHES = 500, 5, 2
PATTERN = Pattern((64, 512), (1, 4))


def sequences(number: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Make whole sequences, with labels that are not shifted; every third is shorter, and its padding has no labels."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for n in range(number):
        tokens = (torch.randint(16, (1,), generator=generator) + torch.arange(SEQ_LEN) * 7) % 256
        labels = tokens.masked_fill(torch.arange(SEQ_LEN) >= (200 if n % 3 == 0 else SEQ_LEN), -100)
        samples.append({"input_ids": tokens, "labels": labels})
    return samples


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=STEPS, learning_rate=1e-2, lr_scheduler_type="constant", per_device_train_batch_size=2,
            per_device_eval_batch_size=2, gradient_accumulation_steps=MICRO_BATCHES, logging_steps=1,
            save_strategy="no", ddp_find_unused_parameters=False, disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        # One mesh of all ranks. To add data parallelism, pass init_device_mesh(...)["sp"] instead of the world.
        mesh = SequenceMesh(dist.group.WORLD if dist.is_initialized() else None, PATTERN, SEQ_LEN)
        set_seed(0)
        config = LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )  # fmt: skip
        model = apply(LlamaForCausalLM(config).double(), PATTERN, mesh)
        trainer = DilatedTrainer(model, args, train_dataset=sequences(24, 0), eval_dataset=sequences(5, 1), mesh=mesh)
        trainer.train()
        result = trainer.evaluate()
        if trainer.is_world_process_zero():
            for log in trainer.state.log_history[:STEPS]:
                print(f"step {log['step']}  loss {log['loss']:.9f}")
            print(f"evaluated  loss {result['eval_loss']:.9f}")
        trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
