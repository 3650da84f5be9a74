"""The same with Accelerate, which holds the model and takes the mean of gradients over ranks.

accelerate launch --num_processes 2 --cpu examples/accelerate_train.py    # or: python examples/accelerate_train.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import LlamaConfig, LlamaForCausalLM

from longnet_dist import Pattern, SequenceMesh
from longnet_dist.integrations.transformers import apply, split_batch

SEQ_LEN, STEPS, ACCUMULATED = 500, 5, 2
PATTERN = Pattern((64, 512), (1, 4))


def main() -> None:
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=ACCUMULATED)
    mesh = SequenceMesh(dist.group.WORLD if dist.is_initialized() else None, PATTERN, SEQ_LEN)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = apply(LlamaForCausalLM(config).double(), PATTERN, mesh)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    for step in range(1, STEPS + 1):
        batches = [(torch.randint(16, (2, 1)) + torch.arange(SEQ_LEN) * 7) % 256 for _ in range(ACCUMULATED)]
        batches[0][0, 300:] = -1  # A sequence that is shorter: its padding is no label, so tokens are counted.
        batches = [{"input_ids": x.clamp(min=0), "labels": x.masked_fill(x < 0, -100)} for x in batches]
        # Of all ranks and forwards of the step: each token weighs the same.
        count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            with accelerator.accumulate(model):
                local = {name: x.to(accelerator.device) for name, x in split_batch(batch, mesh).items()}
                loss = model(**local, num_items_in_batch=count).loss
                # DDP takes the mean over ranks, of which each holds a part; Accelerate divides by the forwards.
                accelerator.backward(loss * mesh.size * ACCUMULATED)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.item()
        accelerator.print(f"step {step}  loss {total:.9f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
