"""Train torchtitan's Llama 3 with dilated attention, each sequence split across all ranks by context parallelism.

python examples/torchtitan_train.py                                     # one process
torchrun --standalone --nproc-per-node 2 examples/torchtitan_train.py   # two processes, with the same losses

torchtitan's own Trainer needs an accelerator, so this script calls its parts in a loop of its own. With an accelerator,
you only need a function in a config registry that returns `apply(config, pattern)`: see docs/integrations.md.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torchtitan.tools import utils

if not torch.cuda.is_available():  # torchtitan does not choose the CPU itself.
    utils.device_type, utils.device_module = "cpu", torch.cpu

from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims, full_dtensor
from torchtitan.distributed.context_parallel import prepare_context_parallel_input
from torchtitan.distributed.utils import dist_sum, init_distributed, set_spmd_backend
from torchtitan.models.llama3.config_registry import llama3_debugmodel

from longnet_dist import Pattern
from longnet_dist.integrations.torchtitan import apply

SEQ_LEN, STEPS = 500, 5
PATTERN = Pattern((64, 512), (1, 4))
TORCH_DTYPE_MAP["float64"] = torch.float64  # So that losses can be compared to many digits.


def main() -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)
    config = apply(llama3_debugmodel(), PATTERN)
    spec, training, parallelism = config.model_spec, config.training, config.parallelism
    del spec.model.layers[2:]
    config.comm.trace_buf_size = 0  # Write no traces.
    training.seq_len, training.mixed_precision_param, training.mixed_precision_reduce = SEQ_LEN, "float64", "float64"
    parallelism.context_parallel_degree = world = init_distributed(config.comm)
    parallelism.spmd_backend = "full_dtensor"  # FSDP in torch 2.13 lacks the default, "spmd_types".
    set_spmd_backend(parallelism.spmd_backend)
    dims = ParallelDims.from_config(parallelism, world)
    spec.model.update_from_config(config=config)
    torch.manual_seed(0)  # Every rank makes the same whole model and the same batches; FSDP keeps a part of each.
    model = spec.model.build().double()
    model.init_weights()
    model = spec.parallelize_fn(
        model, parallel_dims=dims, training=training, parallelism=parallelism, compile_config=config.compile,
        ac_config=config.activation_checkpoint, dump_folder="",
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(1, STEPS + 1):
        tokens = (torch.randint(16, (2, 1)) + torch.arange(SEQ_LEN + 1) * 7) % 256
        inputs, labels, extra_inputs = tokens[:, :-1], tokens[:, 1:], {"positions": torch.arange(SEQ_LEN).expand(2, -1)}
        if dims.cp_enabled:
            inputs, labels, extra_inputs = prepare_context_parallel_input(
                inputs,
                labels,
                extra_inputs,
                dims.get_mesh("cp"),
                inputs.device,
                parallelism.context_parallel_load_balancer,
            )
        inputs, labels, extra_inputs = full_dtensor.parallelize_inputs(dims, inputs, labels, extra_inputs)
        logits, labels = model(inputs, **extra_inputs).to_local(), labels.to_local()
        # This rank's part of the mean over all tokens, as in torchtitan's own loss, because FSDP sums gradients here.
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / (2 * SEQ_LEN)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = dist_sum(loss.detach(), dims.get_optional_mesh("loss"))
        if dist.get_rank() == 0:
            print(f"step {step}  loss {total:.9f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
