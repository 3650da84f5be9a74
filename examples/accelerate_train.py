"""Train a Llama of transformers with Accelerate and dilated attention, each sequence split across all ranks.

python examples/accelerate_train.py                                       # one process
accelerate launch --num_processes 2 --cpu examples/accelerate_train.py    # two processes, with the same losses

Accelerate wraps the model in DDP, which takes the mean of gradients over ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import LlamaConfig, LlamaForCausalLM

from longnet_dist import Pattern, SequenceMesh
from longnet_dist.integrations.transformers import apply, split_batch

SEQ_LEN, STEPS, MICRO_BATCHES = 500, 5, 2
PATTERN = Pattern((64, 512), (1, 4))


def main() -> None:
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=MICRO_BATCHES)
    mesh = SequenceMesh(dist.group.WORLD if dist.is_initialized() else None, PATTERN, SEQ_LEN)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = apply(LlamaForCausalLM(config).double(), PATTERN, mesh)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    for step in range(1, STEPS + 1):
        batches = [(torch.randint(16, (2, 1)) + torch.arange(SEQ_LEN) * 7) % 256 for _ in range(MICRO_BATCHES)]
        batches[0][0, 300:] = -1  # A shorter sequence: -1 becomes padding without labels.
        batches = [{"input_ids": x.clamp(min=0), "labels": x.masked_fill(x < 0, -100)} for x in batches]
        # The number of labels in all micro-batches of the step, on all ranks, so that each token weighs the same.
        num_labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            with accelerator.accumulate(model):
                local = {name: x.to(accelerator.device) for name, x in split_batch(batch, mesh).items()}
                loss = model(**local, num_items_in_batch=num_labels).loss
                # Undo the mean over ranks, which DDP takes, and the division by micro-batches, which Accelerate does.
                accelerator.backward(loss * mesh.size * MICRO_BATCHES)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.item()
        accelerator.print(f"step {step}  loss {total:.9f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
