"""Compare one rank per GPU with ring attention and torch's context parallel. `gpu.py` starts it by torchrun.

All attend the same sequence: longnet_dist by its branches, the others densely. Rank 0 prints a JSON object per result.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from gpu import one_line, parse
from gpu_timing import Run, Sizes, attention_run, measure
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel

from longnet_dist import SequenceMesh, dilated_attention

RING = "zigzag_ring_flash_attn_func"
"""The function of ring-flash-attn that balances causal work."""


def main() -> None:
    sizes = Sizes.of(parse(sys.argv[1:]))
    if sizes.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if sizes.device == "cuda" else "gloo")
    ranks = dist.get_world_size()
    mesh = SequenceMesh(dist.group.WORLD, sizes.pattern, sizes.seq_len)
    local = sizes.inputs(mesh.shard.num_rows)
    for backward in (False, True):
        about = {"ranks": ranks, "pass": "forward + backward" if backward else "forward"}
        with ExitStack() as stack:
            attend = partial(dilated_attention, pattern=sizes.pattern, causal=True, mesh=mesh)
            runs = {"longnet_dist": attention_run(attend, local, backward)}
            for name, make in {"ring-flash-attn": ring, "context parallel": torch_context_parallel}.items():
                try:
                    runs[name] = make(sizes, backward, stack)
                except Exception as error:
                    show(about | {"contestant": name, "not run": one_line(error)})
            results = measure(runs, sizes.rounds, sizes.device)
        for name, result in results.items():
            show(about | {"contestant": name} | result)
    dist.destroy_process_group()


def show(row: dict[str, Any]) -> None:
    if dist.get_rank() == 0:
        print(json.dumps(row), flush=True)


def ring(sizes: Sizes, backward: bool, stack: ExitStack) -> Run:
    """Return a run of ring-flash-attn on this rank's rows."""
    attend: Callable[..., Tensor] = getattr(importlib.import_module("ring_flash_attn"), RING)
    inputs = sizes.inputs(sizes.seq_len // dist.get_world_size())
    return attention_run(partial(attend, causal=True, group=dist.group.WORLD), inputs, backward)


def torch_context_parallel(sizes: Sizes, backward: bool, stack: ExitStack) -> Run:
    """Return a run of torch's context parallel, whose context, entered in `stack`, shards the inputs in place."""
    mesh = init_device_mesh(sizes.device, (dist.get_world_size(),))
    whole = [x.detach().transpose(1, 2).contiguous() for x in sizes.inputs()]
    stack.enter_context(context_parallel(mesh, buffers=whole, buffer_seq_dims=[2] * 4))
    inputs = [x.detach().requires_grad_(i < 3) for i, x in enumerate(whole)]  # The context restores `whole`.
    return attention_run(partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True), inputs, backward)


if __name__ == "__main__":
    main()
