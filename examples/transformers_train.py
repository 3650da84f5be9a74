"""Train a Llama of transformers with dilated attention, each sequence split across all ranks.

python examples/transformers_train.py                                     # one process
torchrun --standalone --nproc-per-node 2 examples/transformers_train.py   # two processes, with the same losses
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from longnet_dist import Pattern, SequenceMesh
from longnet_dist.integrations.transformers import apply, split_batch

SEQ_LEN, STEPS = 500, 5
PATTERN = Pattern((64, 512), (1, 4))


def main() -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo")
    mesh = SequenceMesh(dist.group.WORLD if dist.is_initialized() else None, PATTERN, SEQ_LEN)
    torch.manual_seed(0)  # Every rank makes the same model and the same batches.
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = apply(LlamaForCausalLM(config).double(), PATTERN, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(1, STEPS + 1):
        tokens = (torch.randint(16, (2, 1)) + torch.arange(SEQ_LEN) * 7) % 256
        loss = model(**split_batch({"input_ids": tokens, "labels": tokens}, mesh)).loss
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():  # With DDP or FSDP, multiply the loss by mesh.size instead.
                parameter.grad = mesh.sum(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
        if mesh.rank == 0:
            print(f"step {step}  loss {loss.item():.9f}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
