"""Train a plain PyTorch model with `parallelize_module`, FSDP2 and torch.compile, each sequence split across ranks.

python examples/parallelize.py                                       # one process
torchrun --standalone --nproc-per-node 2 examples/parallelize.py     # two processes, with the same losses
torchrun --standalone --nproc-per-node 4 examples/parallelize.py 2   # four: two chunks of rows x two groups of heads
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from longnet_dist import Pattern, SequenceMesh, next_token_labels, token_loss
from longnet_dist.integrations.pytorch import SequenceParallelAttention

SEQ_LEN, STEPS, WIDTH, HEADS, PATTERN = 500, 5, 32, 4, Pattern((64, 512), (1, 4))


class Attend(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attend = nn.LayerNorm(WIDTH), Attend()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (p(h).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(256, WIDTH), nn.Embedding(SEQ_LEN, WIDTH)
        self.layers, self.head = nn.Sequential(Layer(), Layer()), nn.Linear(WIDTH, 256)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.head(self.layers(self.token(tokens) + self.position(positions)))


def main() -> None:
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"} | os.environ
    tp = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    grid = dist.init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]) // tp, tp), mesh_dim_names=("sp", "tp"))
    mesh = SequenceMesh(grid["sp"], PATTERN, SEQ_LEN)
    attention = SequenceParallelAttention(mesh, causal=True, head_mesh=grid["tp"])
    torch.manual_seed(0)  # Every rank makes the same model and the same batches.
    model = Model().double()
    for layer in model.layers:
        projections = {"q": ColwiseParallel(), "k": ColwiseParallel(), "v": ColwiseParallel(), "out": RowwiseParallel()}
        parallelize_module(layer, grid["tp"], projections if tp > 1 else {})
        parallelize_module(layer, grid["sp"], {"attend": attention})
        layer.compile(fullgraph=True)
        fully_shard(layer, mesh=grid["sp"])
    fully_shard(model, mesh=grid["sp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(1, STEPS + 1):
        tokens = (torch.randint(16, (2, 1)) + torch.arange(SEQ_LEN) * 7) % 256
        targets = mesh.split(next_token_labels(tokens))  # Shift the targets before they are split.
        loss = token_loss(model(mesh.split(tokens), mesh.positions()), targets, mesh)
        (loss * mesh.size).backward()  # FSDP takes the mean of gradients over ranks, which must be summed.
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step}  loss {loss.item():.9f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
