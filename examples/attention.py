"""Compute dilated attention and its gradients with the same code on one process and across ranks.

python examples/attention.py                        # one process
torchrun --nproc-per-node 4 examples/attention.py   # four processes, with the same numbers
"""

import os

import torch
import torch.distributed as dist

from longnet_dist import Pattern, SequenceMesh, dilated_attention

if "RANK" in os.environ:
    dist.init_process_group("gloo")

N, H, D = 1000, 4, 16  # N may be any number.
pattern = Pattern.geometric(max_length=N, base=64, growth=4)
mesh = SequenceMesh(dist.group.WORLD if dist.is_initialized() else None, pattern, seq_len=N)

torch.manual_seed(0)
q, k, v = (torch.randn(1, N, H, D, requires_grad=True) for _ in range(3))
q_local, k_local, v_local = (mesh.split(x) for x in (q, k, v))  # A trainer would load only these rows.
out_local = dilated_attention(q_local, k_local, v_local, pattern, causal=True, mesh=mesh)
out = mesh.join(out_local)
out.square().mean().backward()

if mesh.rank == 0:
    print(f"{mesh.size} ranks of {mesh.shard.chunk} rows: out {out.norm():.5f}, dq {q.grad.norm():.5f}")
if dist.is_initialized():
    dist.destroy_process_group()
