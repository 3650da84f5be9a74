"""The private parts of other packages that longnet_dist uses, each with the reason for using it.

Private names may change in any release. So no other module accesses one, and
`tests/unit/package/test_internals.py` checks each of them in the installed versions. Packages that not every user has
are imported inside the functions.

Three private names must be spelled where they are used, in subclasses:

- `ParallelStyle._apply` is what torch's `parallelize_module` calls (torch 2.13).
- `torch.distributed.Store` calls the methods of a subclass that is written in Python (torch 2.13).
- `FileSystemReader` reads through its attributes `fs`, `path` and `load_id` (torch 2.13).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

UNSHARED_RENDEZVOUS = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""The environment variable that gives each round of torchrun a store of its own when it is "1".

Without it, a restarted round reads stale keys and most restarts fail. It is not documented. Seen in torch 2.13.
"""

CHECKPOINT_METADATA = ".metadata"
"""The file in which `torch.distributed.checkpoint` describes a checkpoint. Seen in torch 2.13."""

CHECKPOINT_METADATA_NAMES = frozenset(
    {
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
        ("torch.serialization", "_get_layout"),
    }
)
"""The private names, as (module, name), in the pickled metadata of every checkpoint.

Our reader unpickles nothing but allowed names, so it must list them. Seen in torch 2.13.
"""


PythonUnpickler: Any = pickle._Unpickler
"""The unpickler in Python: that in C, `pickle.Unpickler`, has no methods per opcode to override.

Overriding one is the only way to restrict an opcode. Seen in Python 3.11.
"""


def num_process_groups() -> int:
    """Return the number of process groups that this process has made.

    torch derives the name of the next group from it, so ranks that make a group together must have made equally many
    before. No public function returns it. Seen in torch 2.13.
    """
    return len(dist.distributed_c10d._world.pg_names)


@contextlib.contextmanager
def groups_of_their_own() -> Iterator[None]:
    """Make groups inside the context whose NCCL communicators are new ones, not split from that of all ranks.

    After `init_process_group(device_id=...)` torch splits each new group from the default group. This split is
    collective over all ranks of the job, also those that make no group, which would hang. Seen in torch 2.13.
    """
    default = dist.group.WORLD
    device = getattr(default, "bound_device_id", None)
    if default is None or device is None:
        yield
        return
    default.bound_device_id = None
    try:
        yield
    finally:
        default.bound_device_id = device


def abort_process_groups() -> None:
    """End all process groups at once, without waiting for collectives that other ranks will never join.

    `destroy_process_group` waits for them, so that an error on one rank would hang there. Seen in torch 2.13.
    """
    dist.distributed_c10d._abort_process_group()


def default_store() -> Any:
    """Return the store of this process's default group, through which all ranks of the job exchange small values.

    No public function returns it. Seen in torch 2.13.
    """
    return dist.distributed_c10d._get_default_store()


def is_in_forward_mode() -> bool:
    """Return whether the caller is inside a `torch.autograd.forward_ad.dual_level`.

    An operator without forward-mode derivatives must raise there, and no public function reports it. Seen in torch
    2.13.
    """
    return torch.autograd.forward_ad._current_level >= 0


def cpu_flash_attention(*args: Any, **options: Any) -> Any:
    """Call the forward of flash attention on CPU, which returns (out, lse).

    The public `scaled_dot_product_attention` returns no lse. Seen in torch 2.13.
    """
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, **options)


def cpu_flash_attention_backward(*args: Any, **options: Any) -> Any:
    """Call the backward of flash attention on CPU.

    Unlike autograd, it accepts an `out` and `lse` that were merged over several calls. Seen in torch 2.13.
    """
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*args, **options)


@functools.cache
def cpu_is_fast_in(dtype: torch.dtype) -> bool:
    """Return whether the flash attention of this CPU is at least as fast in a low-precision dtype as in float32.

    Without instructions for bfloat16 its backward takes five to seven times as long, and in float16 eight times on
    every CPU that was measured (benchmarks/results/attention_2-core-epyc_202611.md). No public function returns what
    the CPU has. Seen in torch 2.13.
    """
    if dtype == torch.bfloat16:
        return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    return dtype != torch.float16


def cuda_flash_attention(*args: Any, **options: Any) -> Any:
    """Call the forward of flash attention on CUDA, which returns (out, lse, ...).

    The public functions return no lse, or take only sequences of variable lengths. Seen in torch 2.13.
    """
    return torch.ops.aten._flash_attention_forward(*args, **options)


def cuda_flash_attention_backward(*args: Any, **options: Any) -> Any:
    """Call the backward of flash attention on CUDA.

    Unlike autograd, it accepts an `out` and `lse` that were merged over several calls. Seen in torch 2.13.
    """
    return torch.ops.aten._flash_attention_backward(*args, **options)


def cudnn_attention(*args: Any, **options: Any) -> Any:
    """Call the forward of cuDNN's attention, which returns (out, lse, ...).

    The public `scaled_dot_product_attention` returns no lse. Seen in torch 2.13.
    """
    return torch.ops.aten._cudnn_attention_forward(*args, **options)


def cudnn_attention_backward(*args: Any, **options: Any) -> Any:
    """Call the backward of cuDNN's attention.

    Unlike autograd, it accepts an `out` and `lse` that were merged over several calls. Seen in torch 2.13.
    """
    return torch.ops.aten._cudnn_attention_backward(*args, **options)


TRITON_OPTIONS = {"enable_fp_fusion": True}
"""Triton's default until version 3.9, which warns that the default will change. Seen in Triton 3.9."""

FLASH_ATTN = {
    2: "flash_attn.flash_attn_interface",
    3: "flash_attn_interface",
    4: "flash_attn.cute.interface",
}
"""The modules of the versions of flash-attn."""


def flash_attn(version: int, name: str) -> Any:
    """Return a private function of flash-attn: forward or backward, of rectangles or of packed rows.

    The public functions accept no `out` and `lse` that were merged over several calls. Read in the sources of
    flash-attn 2.7.4 to 2.8.3, FlashAttention 3 of August 2026, and flash-attn-4 4.0.0b36.
    """
    return getattr(importlib.import_module(FLASH_ATTN[version]), name)


@functools.cache
def problem_of_flash_attn(version: int) -> str | None:
    """Return why a version of flash-attn cannot be used in this process; None if it can.

    Packages that are compiled for another torch fail when they are imported, in many ways.
    """
    module = FLASH_ATTN[version]
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            return "is not installed"
        return f"does not import: {error}"
    except Exception as error:
        return f"does not import: {type(error).__name__}: {error}"
    return None


def checkpoint_files(folder: Path, rank: int) -> list[str]:
    """Return the names of the files that a rank wrote into a checkpoint of `torch.distributed.checkpoint`.

    Our manifest lists them, and the writer does not return them. Seen in torch 2.13.

    Args:
        folder: The checkpoint's folder.
        rank: The rank in the group that wrote it; rank 0 also wrote the metadata.
    """
    names = [path.name for path in folder.glob(f"__{rank}_*")]
    return [*names, CHECKPOINT_METADATA] if rank == 0 else names


def pickle_by_value(module: ModuleType) -> None:
    """Make Ray send the classes and functions of `module` as code, not as references to the module.

    So an actor of such a class starts without importing this package and torch, which takes seconds. Ray documents
    neither its copy of cloudpickle nor this function. Seen in Ray 2.60.
    """
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(module)


def ray_address(address: str) -> str:
    """Return the HOST:PORT to which `ray.init` connects for an address without a scheme, such as `auto`.

    No public function tells before it connects, which takes minutes if nothing answers there. Seen in Ray 2.60.

    Raises:
        ConnectionError: If the address is `auto`, and no cluster runs on this machine.
    """
    from ray._private.services import canonicalize_bootstrap_address

    return str(canonicalize_bootstrap_address(address))


def attention_implementation(config: Any) -> str | None:
    """Return the name of the attention that a transformers model with this config calls.

    A public method sets it, and none returns it. Seen in transformers 5.24.
    """
    return config._attn_implementation


def add_data_loader(accelerator: Any, loader: Any) -> None:
    """Add a prepared data loader to those whose state an `Accelerator` saves and whose end it notices.

    The only public way is `Accelerator.prepare_data_loader`, which would give each rank sequences of its own. Seen in
    accelerate 1.15.
    """
    accelerator._dataloaders.append(loader)


def mark_as_unprepared(model: Any) -> None:
    """Remove the mark by which an `Accelerator` recognises a model that it has prepared.

    `Trainer.evaluate` prepares a model without DDP. With the mark, it would then be trained without DDP too. Seen in
    accelerate 1.15.
    """
    vars(model).pop("_is_accelerate_prepared", None)


def fill_tensor_parallel_axis(strategy: Any) -> None:
    """Set the axis "tensor_parallel" of a Lightning `ModelParallelStrategy` to all ranks that the other axis leaves.

    This changes only "auto", which Lightning itself would set to the number of devices per node. Seen in Lightning 2.6.
    """
    if strategy._tensor_parallel_size == "auto":
        strategy._tensor_parallel_size = strategy.world_size // int(strategy._data_parallel_size)


def set_sharding(module: Any, config: Any) -> None:
    """Set the `ShardingConfig` by which a torchtitan module is parallelized.

    A module's own config could hold it only if it were known before the mesh. Seen in torchtitan 0.3.
    """
    module._sharding_config = config


def configured_class(config: Any) -> Any:
    """Return the class that a torchtitan config builds.

    The only public way to learn it is to build an instance, which may be large. Seen in torchtitan 0.3.
    """
    return config._owner
