"""A failure here means: a torchtitan model over a mesh of ranks is not that model on one process, or a rank hangs.

torchtitan's parts are its own: models, meshes, FSDP, tensor parallelism, sharding of inputs, Trainer. The program that
the ranks run is at the end of this file.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import types

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from longnet_dist import Pattern
from tests.launch.jobs import forked, run

pytestmark = [pytest.mark.launch, pytest.mark.timeout(300)]
PATTERN, SEQ_LEN, RANKS = Pattern((8, 32, 128), (1, 2, 4)), 64, 4
CASES = ("trainer", "long", "data", "heads", "grouped", "typed", "refusals")
MESHES: dict[str, object] = {}
"""ParallelDims by their settings: DTensor's caches take one mesh for another of the same ranks."""


def test_the_example_has_the_losses_of_one_process_on_two():
    curves = []
    for ranks in (1, 2):
        done = (run if ranks == 2 else forked)(ranks, "examples/torchtitan_train.py")
        assert done.returncode == 0, done.stderr
        curves.append([float(loss) for loss in re.findall(r"step \d+  loss ([\d.]+)", done.stdout)])
        assert len(curves[-1]) == 5, done.stdout
        assert curves[-1][4] < curves[-1][0]
    assert curves[1] == pytest.approx(curves[0], abs=2e-9)


def test_ranks_are_one_process():
    """See the functions of the names in `CASES`."""
    done = forked(RANKS, "-m", "tests.launch.test_torchtitan")
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"(\w+): as it must be", done.stdout)) == sorted(CASES * RANKS), done.stdout


def on_a_cpu():
    """Tell torchtitan, which looks for an accelerator, before the rest of it is imported."""
    from torchtitan.tools import utils

    utils.device_type = "cpu"
    utils.device_module = types.SimpleNamespace(  # With what the Trainer asks of an accelerator.
        set_device=lambda device: None,
        device_count=lambda: 1,
        current_device=lambda: 0,
        get_device_name=lambda device: "cpu",
        get_device_properties=lambda device: types.SimpleNamespace(total_memory=1),
        memory_stats=lambda device: {},
        reset_peak_memory_stats=lambda: None,
        empty_cache=lambda: None,
    )
    from torchtitan.config import TORCH_DTYPE_MAP

    TORCH_DTYPE_MAP["float64"] = torch.float64


def small(family="llama3", pattern=PATTERN, backend="full_dtensor", parallelize_fn=None, join=False, **degrees):
    """The debug config of a family, of two layers, in float64."""
    from torchtitan.models.llama3.config_registry import llama3_debugmodel
    from torchtitan.models.qwen3.config_registry import qwen3_debugmodel

    from longnet_dist.integrations.torchtitan import apply

    config = {"llama3": llama3_debugmodel, "qwen3": qwen3_debugmodel}[family]()
    del config.model_spec.model.layers[2:]
    config.model_spec.model.enable_weight_tying = False  # It is lost where a model was not made on the meta device.
    if parallelize_fn is not None:
        config.model_spec = dataclasses.replace(config.model_spec, parallelize_fn=parallelize_fn)
    training = config.training
    training.seq_len, training.dtype, training.local_batch_size = SEQ_LEN, "float64", 2
    training.mixed_precision_param = training.mixed_precision_reduce = "float64"
    config.parallelism.spmd_backend = backend
    for name, degree in degrees.items():
        setattr(config.parallelism, f"{name}_degree", degree)
    return apply(config, pattern, join_documents=join)


def build(config, world):
    """The model and its ParallelDims; every rank makes the same one."""
    from torchtitan.distributed import ParallelDims
    from torchtitan.distributed.utils import set_spmd_backend

    set_spmd_backend(config.parallelism.spmd_backend)
    spec = config.model_spec
    spec.model.update_from_config(config=config)
    torch.manual_seed(0)
    model = spec.model.build().double()
    model.init_weights()
    dims = ParallelDims.from_config(config.parallelism, world)
    dims = MESHES.setdefault(repr(dims), dims)
    model = spec.parallelize_fn(
        model, parallel_dims=dims, training=config.training, parallelism=config.parallelism,
        compile_config=config.compile, ac_config=config.activation_checkpoint, dump_folder="",
    )  # fmt: skip
    return model, dims


def alone(model, **_):
    return model


def draw(batch):
    generator = torch.Generator().manual_seed(batch)
    tokens = torch.randint(2048, (batch, SEQ_LEN + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:], torch.arange(SEQ_LEN).repeat(batch, 1)


def shard(config, dims, inputs, labels, positions, balancer=None):
    """This rank's part, as the Trainer makes it."""
    from torchtitan.distributed import full_dtensor
    from torchtitan.distributed.context_parallel import prepare_context_parallel_input

    if dims.dp_enabled:
        mesh = dims.get_mesh("batch")
        inputs, labels, positions = (x.chunk(mesh.size())[mesh.get_local_rank()] for x in (inputs, labels, positions))
    given = {"positions": positions}
    if dims.cp_enabled:
        where = dims.get_mesh("cp"), inputs.device, balancer
        inputs, labels, given = prepare_context_parallel_input(inputs, labels, given, *where)
    if config.parallelism.spmd_backend == "full_dtensor":
        return full_dtensor.parallelize_inputs(dims, inputs, labels, given)
    return inputs, labels, given


def reference(batch, family="llama3"):
    """The model of one process, the logits and the loss; its gradients are there."""
    whole, _ = build(small(family, parallelize_fn=alone), 1)
    inputs, labels, positions = draw(batch)
    logits = whole(inputs, positions=positions)
    loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward(retain_graph=True)
    return whole, logits, loss


def compare(family="llama3", join=False, **degrees):
    """Logits, loss and gradients over the mesh of all ranks, against one process."""
    config = small(family, join=join, **degrees)
    whole, expected, _ = reference(4, family)
    model, dims = build(config, RANKS)
    inputs, labels, positions = draw(4)
    positions = positions % 20 if join else positions
    local, _, given = shard(config, dims, inputs, labels, positions)
    logits = model(local, **given).full_tensor()  # A DTensor: what ranks hold of it is as torchtitan says.
    assert_close(logits, expected, rtol=0, atol=1e-10)
    cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    right = dict(whole.named_parameters())
    for name, mine in model.named_parameters():
        name = name.replace("_checkpoint_wrapped_module.", "")
        assert_close(
            mine.grad.full_tensor(), right.pop(name).grad, rtol=0, atol=1e-10, msg=lambda said, name=name: name + said
        )
    assert not right


def long():
    compare(context_parallel=4)


def data():
    """FSDP beside it, over other sequences."""
    compare(context_parallel=2, data_parallel_shard=2)


def grouped():
    """Qwen3: grouped queries, and norms of heads; documents that are packed, and attended as one text."""
    compare("qwen3", join=True, context_parallel=4)


def typed():
    compare_typed(context_parallel=4)


def heads():
    """Tensor parallelism beside it, in which torchtitan splits heads and, between the attentions, rows."""
    compare_typed(context_parallel=2, tensor_parallel=2)


def compare_typed(**degrees):
    """torchtitan's default backend, with its checks of types; torch 2.13's FSDP does not know it, so without."""
    from torchtitan.distributed.spmd_types import annotate_input_spmd_types
    from torchtitan.distributed.utils import get_spmd_context

    def parallelize(model, *, parallel_dims, **_):
        model.parallelize(parallel_dims)
        return model

    whole, expected, _ = reference(2)
    weights = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(1))
    whole.zero_grad()
    (expected * weights).sum().backward()
    config = small(backend="spmd_types", parallelize_fn=parallelize, **degrees)
    model, dims = build(config, RANKS)
    inputs, _, given = annotate_input_spmd_types(dims, *shard(config, dims, *draw(2)))
    with get_spmd_context(parallel_dims=dims, spmd_typechecking=True)():
        logits = model(inputs, **given)
    mine = [x.chunk(dims.cp, 1)[dist.get_rank() // dims.tp] for x in (expected, weights)]
    mine = [x.chunk(dims.tp, 2)[dist.get_rank() % dims.tp] for x in mine]  # Of the vocabulary it has a part.
    assert_close(logits.detach(), mine[0].detach(), rtol=0, atol=1e-10)
    with get_spmd_context(parallel_dims=dims)():
        (logits * mine[1]).sum().backward()
    cp = dims.get_mesh("cp").get_group()
    for (name, parameter), right in zip(model.named_parameters(), whole.parameters(), strict=True):
        grad, expected = parameter.grad.clone(), right.grad
        split = [d for d in range(grad.dim()) if grad.shape[d] != expected.shape[d]]
        dist.all_reduce(grad, group=cp if split else None)  # Norms see a part of the rows under "tp", too.
        for d in split:
            expected = expected.chunk(dims.tp, d)[dist.get_rank() % dims.tp]
        assert_close(grad, expected, rtol=0, atol=1e-9, msg=lambda said, name=name: name + said)


def trainer():
    """A step of its Trainer, with selective checkpointing and its loss in chunks, which is in float32."""
    from torch.distributed.tensor import distribute_tensor
    from torchtitan.distributed import ParallelDims

    def load(dp_rank, dp_world_size, **_):
        inputs, labels, positions = (x.chunk(dp_world_size)[dp_rank] for x in draw(4))
        return [({"input": inputs, "positions": positions}, labels)]

    whole, _, loss = reference(4)
    config = small(context_parallel=2, data_parallel_shard=2)
    config.debug.seed, config.debug.enable_structured_logging, config.comm.trace_buf_size = 0, False, 0
    config.dataloader, config.tokenizer = (types.SimpleNamespace(build=build) for build in (load, lambda **_: None))
    made = config.build()
    with torch.no_grad():  # On a CPU, DTensor draws each rank's part alike.
        for mine, right in zip(made.model_parts[0].parameters(), whole.parameters(), strict=True):
            mine.copy_(distribute_tensor(right.detach(), mine.device_mesh, mine.placements))
    said = {}
    made.metrics_processor.log = lambda step, mean, most, norm, **_: said.update(mean=mean, norm=norm)
    made.step = 1
    made.train_step(made.batch_generator(made.dataloader))
    # torchtitan 0.3.0 sums the loss, which full_dtensor has already summed, once more over the ranks.
    assert_close(said["mean"] / RANKS, loss.item(), rtol=1e-6, atol=0)
    norm = torch.stack([p.grad.norm() for p in whole.parameters()]).norm()
    assert_close(said["norm"], norm.item(), rtol=1e-6, atol=0)
    MESHES[repr(ParallelDims.from_config(config.parallelism, RANKS))] = made.parallel_dims
    made.close()


def refusals():
    """Each a ValueError on every rank, also where one alone is wrong."""
    balanced, odd = small(context_parallel=4), small(context_parallel=4)
    balanced.parallelism.context_parallel_load_balancer = "headtail"
    odd.training.seq_len = 63
    degrees = {"context_parallel": 2, "tensor_parallel": 2}
    for config, message in (
        (balanced, r"context_parallel_load_balancer is 'headtail'.*contiguous"),
        (odd, "seq_len is 63; context_parallel_degree = 4 must divide it"),
        (small(pattern=Pattern((64,), (16,)), **degrees), r"leaves 8 of 16 .* in the branch \(w=64, r=16\)"),
        (small(pattern=Pattern((64,), (2,), "blocked"), **degrees), r"tensor_parallel_degree = 2 .* blocked"),
    ):
        with pytest.raises(ValueError, match=message):
            build(config, RANKS)
    config = small(context_parallel=4)
    model, dims = build(config, RANKS)
    inputs, labels, positions = draw(2)

    def refused(message, positions, balancer=None):
        local, _, given = shard(config, dims, inputs, labels, positions, balancer)
        with pytest.raises(ValueError, match=message):
            model(local, **given)

    refused("positions are not contiguous", positions, balancer="headtail")
    refused(r"positions must be global.*join_documents=True", positions % 20)
    alone_wrong = positions.clone()
    alone_wrong[:, -1] = 0
    refused("positions must be global", alone_wrong)
    local, _, _ = shard(config, dims, inputs, labels, positions)
    with pytest.raises(ValueError, match="positions are missing"):
        model(local)
    rows = SEQ_LEN if dist.get_rank() == 0 else SEQ_LEN // 4
    with pytest.raises(ValueError, match=r"tokens has 64 rows, and this rank holds 16.*cp_shard"):
        model(inputs[:, :rows], positions=positions[:, :rows])


def main():
    on_a_cpu()
    from torchtitan.config import CommConfig
    from torchtitan.distributed.utils import init_distributed

    init_distributed(CommConfig(trace_buf_size=0))
    for name in sys.argv[1:] or CASES:
        globals()[name]()
        print(f"{name}: as it must be", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
