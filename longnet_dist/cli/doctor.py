"""`longnet-dist doctor`: which devices, backends and kernels work on this machine, and why the others do not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from longnet_dist import __version__
from longnet_dist.extras import extra

if TYPE_CHECKING:
    from longnet_dist.attention.kernels import KernelRequest

_PACKAGES = ("torch", "numpy", "tyro", "rich", "tensorboard", "triton", "flash-attn", "flash-attn-4", "ray")
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def run_doctor(
    cluster: bool = False,
    timeout: float = 30.0,
    nccl: bool = False,
    device: Literal["cpu", "cuda"] | None = None,
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None,
    head_dim: int = 64,
    bias: bool = False,
    capability: str | None = None,
) -> None:
    """Print which devices, backends and kernels work on this machine, and why the others do not.

    Args:
        cluster: Check the nodes and links of the Ray cluster at RAY_ADDRESS instead; the exit code is 1 on a problem.
        timeout: Time limit for each answer of a node, in seconds; only with --cluster.
        nccl: Measure links between nodes with GPUs by NCCL, which needs a free GPU on each; only with --cluster.
        device: Explain the choice of a kernel for calls on this device; by default cuda if there is a GPU.
        dtype: Explain it for this dtype; by default bfloat16 on cuda and float32 on cpu.
        head_dim: Explain it for this head dim.
        bias: Explain it for calls with a position bias (T5 or ALiBi).
        capability: Explain it for a GPU of this compute capability, such as 9.0, which need not be here.
    """
    if not 1 <= head_dim <= 1 << 20:
        raise ValueError(f"--head-dim is {head_dim}; it must be at least 1, and at most 2^20")
    if not cluster:
        print(diagnose_machine(device, dtype, head_dim, bias, capability))
        return
    with extra("ray", "--cluster"):
        from longnet_dist.integrations.ray.connection import has_no_cluster
        from longnet_dist.integrations.ray.doctor import diagnose_cluster
    if has_no_cluster():
        print("RAY_ADDRESS names no cluster: starting one on this machine, and checking it")
    report, problems = diagnose_cluster(timeout, nccl=nccl)
    print(report)
    if problems:
        raise SystemExit(1)


def diagnose_machine(
    device: str | None = None,
    dtype: str | None = None,
    head_dim: int = 64,
    bias: bool = False,
    capability: str | None = None,
) -> str:
    """Return a report for people: versions, devices, backends, and the kernels; for the arguments, see `run_doctor`."""
    return "\n".join(
        [
            f"python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} CPU cores",
            f"  longnet-dist {__version__}",
            *(f"  {package} {_installed_version(package)}" for package in _PACKAGES),
            "",
            "devices",
            *_devices(),
            "",
            "backends",
            *_backends(),
            "",
            'the attention kernel that kernel="auto" takes, for head dim 64',
            *_kernels(),
            "",
            *_explained(device, dtype, head_dim, bias, capability),
        ]
    )


def _installed_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"


def _devices() -> list[str]:
    import torch

    threads = torch.get_num_threads()
    lines = [f"  cpu: {threads} thread{'s' * (threads > 1)}"]
    if torch.version.cuda is None:
        return [*lines, "  cuda: none (this torch is built without CUDA)"]
    if not torch.cuda.is_available():
        return [*lines, "  cuda: none (torch is built with CUDA, but finds no device or driver)"]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        lines.append(f"  cuda:{index}: {device.name}, {memory}, compute capability {device.major}.{device.minor}")
    return lines


def _backends() -> list[str]:
    import torch
    import torch.distributed as dist

    has_gloo = dist.is_available() and dist.is_gloo_available()
    if not dist.is_nccl_available():
        nccl = "no: this torch is built without NCCL"
    elif not torch.cuda.is_available():
        nccl = "no: NCCL needs a GPU, but there is none"
    else:
        nccl = "usable, for GPU tensors"
    gloo = "usable, for CPU tensors" if has_gloo else "no: this torch is built without gloo"
    return [f"  gloo: {gloo}", f"  nccl: {nccl}"]


def _kernels() -> list[str]:
    import torch

    from longnet_dist.attention.kernels import KernelRequest

    has_gpu = torch.cuda.is_available()
    lines = []
    for device in ("cpu", "cuda") if has_gpu else ("cpu",):
        for dtype in _DTYPES:
            name, why = _chosen(KernelRequest(torch.device(device), getattr(torch, dtype), 64))
            lines.append(f"  {device:5} {dtype:9} {name}: {why}")
    return lines if has_gpu else [*lines, "  cuda  none: there is no GPU"]


def _explained(
    device: str | None, dtype: str | None, head_dim: int, bias: bool, capability: str | None
) -> Iterator[str]:
    """Yield the verdict on each kernel for one kind of call."""
    import torch

    from longnet_dist.attention.kernels import KERNELS, ONLY_BY_NAME, KernelRequest, flash

    device = device or ("cuda" if capability or torch.cuda.is_available() else "cpu")
    if capability and device == "cpu":
        raise ValueError(f"capability is {capability!r}, and device is 'cpu': only GPUs have a compute capability")
    dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
    assumed = _parsed(capability) if capability else None
    request = KernelRequest(torch.device(device), getattr(torch, dtype), head_dim, bias=bias, capability=assumed)
    yield f"for {request}{f', compute capability {capability}' if capability else ''}:"
    if device == "cuda" and not (capability or torch.cuda.is_available()):
        yield "  no kernel, because there is no GPU; --capability 9.0 explains the choice on one that is not here"
        return
    chosen, _ = _chosen(request)
    for name, kernel in KERNELS.items():
        reasons = "; ".join(kernel.unsupported(request))
        by_name = ' if it is named, and never by kernel="auto"' if name in ONLY_BY_NAME else ""
        taken = ', and taken by kernel="auto"' if name == chosen else by_name
        version = f" in version {flash.version(request)}" if name == "flash" else ""
        yield f"  {name:6} {f'no: {reasons}' if reasons else f'usable{version}{taken}'}"
    if chosen in KERNELS and not bias:
        packs = not KERNELS[chosen].unsupported(replace(request, variable_lengths=True))
        yield f"  documents: {'one call for each branch' if packs else 'the segments of each document by themselves'}"


def _chosen(request: KernelRequest) -> tuple[str, str]:
    """Return the name of the kernel that "auto" takes, and what it is for; "none" and the reasons if there is none."""
    from longnet_dist.attention.kernels import KERNELS, WHY, choose_kernel

    try:
        kernel = choose_kernel("auto", request)
    except ValueError as error:
        return "none", str(error)
    name = next(name for name in KERNELS if KERNELS[name] is kernel)
    return name, WHY[name]


def _parsed(capability: str) -> tuple[int, int]:
    major, _, minor = capability.partition(".")
    if not (major.isdecimal() and minor.isdecimal() and capability.isascii()):
        raise ValueError(f"capability is {capability!r}; it must be two numbers, such as 9.0 for an H100")
    return int(major), int(minor)
