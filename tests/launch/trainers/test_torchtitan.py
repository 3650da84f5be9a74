"""A failure here means: a torchtitan model across ranks differs from that model on one process, or a rank hangs.

Models, meshes, FSDP, tensor parallelism, the sharding of inputs and the Trainer are torchtitan's own. The ranks run the
`main` at the end of this file.
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
from tests.launch.jobs import forked
from tests.launch.trainers.examples import losses_in, output_of

pytestmark = [pytest.mark.launch, pytest.mark.timeout(300)]
PATTERN, SEQ_LEN, RANKS = Pattern((8, 32, 128), (1, 2, 4)), 64, 4
CASES = ("trainer", "long", "data", "heads", "grouped", "packed", "typed", "errors")
MESHES: dict[str, object] = {}
"""The ParallelDims of each setting, built once, because DTensor's caches confuse meshes of the same ranks."""


def test_the_example_has_the_losses_of_one_process_on_two():
    one, two = (losses_in(output_of("torchtitan_train.py", ranks, forks=ranks == 1)) for ranks in (1, 2))
    assert two == pytest.approx(one, abs=2e-9)


@pytest.mark.slow
def test_ranks_compute_what_one_process_does():
    """Each case is a function of this module, with the name of the case."""
    job = forked(RANKS, "-m", "tests.launch.trainers.test_torchtitan")
    assert job.returncode == 0, job.stderr
    assert sorted(re.findall(r"(\w+): passed", job.stdout)) == sorted(CASES * RANKS), job.stdout


def use_the_cpu():
    """Make torchtitan, which looks for an accelerator, use the CPU; call this before importing the rest of it."""
    from torchtitan.tools import utils

    utils.device_type = "cpu"
    utils.device_module = types.SimpleNamespace(  # What the Trainer asks of an accelerator.
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


def make_config(family="llama3", pattern=PATTERN, backend="full_dtensor", parallelize_fn=None, join=False, **degrees):
    """Make the debug config of a family, with two layers, in float64."""
    from torchtitan.models.llama3.config_registry import llama3_debugmodel
    from torchtitan.models.qwen3.config_registry import qwen3_debugmodel

    from longnet_dist.integrations.torchtitan import apply

    config = {"llama3": llama3_debugmodel, "qwen3": qwen3_debugmodel}[family]()
    del config.model_spec.model.layers[2:]
    config.model_spec.model.enable_weight_tying = False  # Only models made on the meta device keep the tie.
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
    """Build the model, the same on every rank, and its ParallelDims."""
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


def do_not_parallelize(model, **_):
    return model


def draw(batch_size):
    generator = torch.Generator().manual_seed(batch_size)
    tokens = torch.randint(2048, (batch_size, SEQ_LEN + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:], torch.arange(SEQ_LEN).repeat(batch_size, 1)


def shard(config, dims, inputs, labels, positions, balancer=None):
    """Return this rank's part of a batch, as the Trainer makes it."""
    from torchtitan.distributed import full_dtensor
    from torchtitan.distributed.context_parallel import prepare_context_parallel_input

    if dims.dp_enabled:
        mesh = dims.get_mesh("batch")
        inputs, labels, positions = (x.chunk(mesh.size())[mesh.get_local_rank()] for x in (inputs, labels, positions))
    extra_inputs = {"positions": positions}
    if dims.cp_enabled:
        sharding = dims.get_mesh("cp"), inputs.device, balancer
        inputs, labels, extra_inputs = prepare_context_parallel_input(inputs, labels, extra_inputs, *sharding)
    if config.parallelism.spmd_backend == "full_dtensor":
        return full_dtensor.parallelize_inputs(dims, inputs, labels, extra_inputs)
    return inputs, labels, extra_inputs


def pack(positions):
    """Return positions of documents, which cross ranks and end elsewhere in each sequence."""
    return torch.stack([row % period for row, period in zip(positions, (20, 64, 7, 33), strict=False)])


def reference(batch_size, family="llama3", packed=False):
    """Return the model of one process with its gradients, the logits and the loss."""
    whole, _ = build(make_config(family, parallelize_fn=do_not_parallelize), 1)
    inputs, labels, positions = draw(batch_size)
    logits = whole(inputs, positions=pack(positions) if packed else positions)
    loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward(retain_graph=True)
    return whole, logits, loss


def compare(family="llama3", join=False, packed=False, **degrees):
    """Compare logits, loss and gradients across all ranks with one process."""
    config = make_config(family, join=join, **degrees)
    whole, expected, _ = reference(4, family, packed)
    model, dims = build(config, RANKS)
    inputs, labels, positions = draw(4)
    positions = pack(positions) if join or packed else positions
    local, _, extra_inputs = shard(config, dims, inputs, labels, positions)
    logits = model(local, **extra_inputs).full_tensor()  # A DTensor of torchtitan's own placements.
    assert_close(logits, expected, rtol=0, atol=1e-10)
    cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    expected_parameters = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        name = name.replace("_checkpoint_wrapped_module.", "")
        grad, expected_grad = parameter.grad.full_tensor(), expected_parameters.pop(name).grad
        assert_close(grad, expected_grad, rtol=0, atol=1e-10, msg=lambda text, name=name: name + text)
    assert not expected_parameters


def long():
    compare(context_parallel=4)


def data():
    """Compare with data parallelism: FSDP, over ranks that hold other sequences."""
    compare(context_parallel=2, data_parallel_shard=2)


def grouped():
    """Compare Qwen3, with grouped queries and norms per head; packed documents are treated as one text."""
    compare("qwen3", join=True, context_parallel=4)


def packed():
    """Compare packed documents, each computed alone, with selective checkpointing and FSDP."""
    compare(packed=True, context_parallel=2, data_parallel_shard=2)


def typed():
    compare_typed(context_parallel=4)
    compare_typed(packed=True, context_parallel=4)


def heads():
    """Compare with tensor parallelism, by which torchtitan splits heads and, between the attentions, rows."""
    compare_typed(context_parallel=2, tensor_parallel=2)


def compare_typed(packed=False, **degrees):
    """Compare under torchtitan's default backend with its type checks; without FSDP, whose torch 2.13 lacks it."""
    from torchtitan.distributed.spmd_types import annotate_input_spmd_types
    from torchtitan.distributed.utils import get_spmd_context

    def parallelize(model, *, parallel_dims, **_):
        model.parallelize(parallel_dims)
        return model

    whole, expected, _ = reference(2, packed=packed)
    weights = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(1))
    whole.zero_grad()
    (expected * weights).sum().backward()
    config = make_config(backend="spmd_types", parallelize_fn=parallelize, **degrees)
    model, dims = build(config, RANKS)
    inputs, labels, positions = draw(2)
    batch = inputs, labels, pack(positions) if packed else positions
    inputs, _, extra_inputs = annotate_input_spmd_types(dims, *shard(config, dims, *batch))
    with get_spmd_context(parallel_dims=dims, spmd_typechecking=True)():
        logits = model(inputs, **extra_inputs)
    parts = [x.chunk(dims.cp, 1)[dist.get_rank() // dims.tp] for x in (expected, weights)]
    parts = [x.chunk(dims.tp, 2)[dist.get_rank() % dims.tp] for x in parts]  # "tp" splits the vocabulary.
    assert_close(logits.detach(), parts[0].detach(), rtol=0, atol=1e-10)
    with get_spmd_context(parallel_dims=dims)():
        (logits * parts[1]).sum().backward()
    cp = dims.get_mesh("cp").get_group()
    for (name, parameter), reference_parameter in zip(model.named_parameters(), whole.parameters(), strict=True):
        grad, expected = parameter.grad.clone(), reference_parameter.grad
        split = [d for d in range(grad.dim()) if grad.shape[d] != expected.shape[d]]
        dist.all_reduce(grad, group=cp if split else None)  # Norms see a part of the rows under "tp" too.
        for d in split:
            expected = expected.chunk(dims.tp, d)[dist.get_rank() % dims.tp]
        assert_close(grad, expected, rtol=0, atol=1e-9, msg=lambda text, name=name: name + text)


def trainer():
    """Compare a step of torchtitan's Trainer, with selective checkpointing and a chunked loss, which is in float32."""
    from torch.distributed.tensor import distribute_tensor
    from torchtitan.distributed import ParallelDims

    def load(dp_rank, dp_world_size, **_):
        inputs, labels, positions = (x.chunk(dp_world_size)[dp_rank] for x in draw(4))
        return [({"input": inputs, "positions": positions}, labels)]

    whole, _, loss = reference(4)
    config = make_config(context_parallel=2, data_parallel_shard=2)
    config.debug.seed, config.debug.enable_structured_logging, config.comm.trace_buf_size = 0, False, 0
    config.dataloader, config.tokenizer = (types.SimpleNamespace(build=build) for build in (load, lambda **_: None))
    trainer = config.build()
    with torch.no_grad():  # On CPU, DTensor would initialize each rank's part to the same values.
        for parameter, expected in zip(trainer.model_parts[0].parameters(), whole.parameters(), strict=True):
            parameter.copy_(distribute_tensor(expected.detach(), parameter.device_mesh, parameter.placements))
    logged = {}
    trainer.metrics_processor.log = lambda step, mean, most, norm, **_: logged.update(mean=mean, norm=norm)
    trainer.step = 1
    trainer.train_step(trainer.batch_generator(trainer.dataloader))
    # full_dtensor already sums the loss over ranks, and torchtitan 0.3.0 does so again.
    assert_close(logged["mean"] / RANKS, loss.item(), rtol=1e-6, atol=0)
    norm = torch.stack([p.grad.norm() for p in whole.parameters()]).norm()
    assert_close(logged["norm"], norm.item(), rtol=1e-6, atol=0)
    MESHES[repr(ParallelDims.from_config(config.parallelism, RANKS))] = trainer.parallel_dims
    trainer.close()


def errors():
    """Check that wrong uses raise ValueError on every rank, even if only one rank is wrong."""
    balanced, odd = make_config(context_parallel=4), make_config(context_parallel=4)
    balanced.parallelism.context_parallel_load_balancer = "headtail"
    odd.training.seq_len = 63
    degrees = {"context_parallel": 2, "tensor_parallel": 2}
    for config, message in (
        (balanced, r"context_parallel_load_balancer is 'headtail'.*contiguous"),
        (odd, "seq_len is 63; context_parallel_degree = 4 must divide it"),
        (make_config(pattern=Pattern((64,), (16,)), **degrees), r"leaves 8 of 16 .* in the branch \(w=64, r=16\)"),
        (make_config(pattern=Pattern((64,), (2,), "blocked"), **degrees), r"tensor_parallel_degree = 2 .* blocked"),
    ):
        with pytest.raises(ValueError, match=message):
            build(config, RANKS)
    config = make_config(context_parallel=4)
    model, dims = build(config, RANKS)
    inputs, labels, positions = draw(2)

    def check(message, positions, balancer=None):
        local, _, extra_inputs = shard(config, dims, inputs, labels, positions, balancer)
        with pytest.raises(ValueError, match=message):
            model(local, **extra_inputs)

    check("positions are not contiguous", positions, balancer="headtail")
    wrong_on_one_rank = positions.clone()
    wrong_on_one_rank[:, -1] = 1
    check("positions are not contiguous", wrong_on_one_rank)
    local, _, _ = shard(config, dims, inputs, labels, positions)
    with pytest.raises(ValueError, match="positions are missing"):
        model(local)
    rows = SEQ_LEN if dist.get_rank() == 0 else SEQ_LEN // 4
    with pytest.raises(ValueError, match=r"tokens has 64 rows, and this rank holds 16.*cp_shard"):
        model(inputs[:, :rows], positions=positions[:, :rows])


def main():
    use_the_cpu()
    from torchtitan.config import CommConfig
    from torchtitan.distributed.utils import init_distributed

    init_distributed(CommConfig(trace_buf_size=0))
    for name in sys.argv[1:] or CASES:
        globals()[name]()
        print(f"{name}: passed", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
