"""What this machine has, and which kernels and backends are usable here, and why the others are not."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch
import torch.distributed as dist

from longnet_dist.attention.kernels import KERNELS, Kernel, KernelRequest

_PACKAGES = ("longnet-dist", "torch", "numpy", "tyro", "rich", "tensorboard", "triton", "flash-attn", "ray")


def diagnose() -> str:
    """A report for people: versions, devices, backends, kernels by device and dtype."""
    lines = [f"python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} CPU cores"]
    lines += [f"  {package} {_version(package)}" for package in _PACKAGES]
    lines += ["", "devices", f"  cpu: {torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            capability = f"{device.major}.{device.minor}"
            lines.append(
                f"  cuda:{index}: {device.name}, {device.total_memory / 2**30:.0f} GiB, compute capability {capability}"
            )
    else:
        lines.append(f"  cuda: none ({_why_no_cuda()})")
    lines += ["", "backends", *(f"  {name}: {reason}" for name, reason in _backends().items())]
    lines += ["", 'attention kernels (kernel="auto" takes the first that is usable)']
    for kind in ("cpu", "cuda"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for name, module in KERNELS.items():
                against = _against(module, kind, dtype)
                verdict = f"no: {'; '.join(against)}" if against else "usable"
                lines.append(f"  {kind:5} {str(dtype).removeprefix('torch.'):9} {name:6} {verdict}")
    lines += ["  with a relative position bias: eager alone, which has its gradient"]
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    return "torch is built with CUDA, and finds no device or driver"


def _backends() -> dict[str, str]:
    gloo = "usable, for CPU tensors" if dist.is_available() and dist.is_gloo_available() else "no: torch lacks it"
    if not dist.is_nccl_available():
        nccl = "no: this torch is built without NCCL"
    else:
        nccl = "usable, for GPUs" if torch.cuda.is_available() else "no: NCCL needs a GPU, and there is none"
    return {"gloo": gloo, "nccl": nccl}


def _against(module: Kernel, kind: str, dtype: torch.dtype) -> list[str]:
    if kind == "cuda" and not torch.cuda.is_available():
        return ["there is no GPU"]
    return module.unsupported(KernelRequest(torch.device(kind), dtype, head_dim=64))
