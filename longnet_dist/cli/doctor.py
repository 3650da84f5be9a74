"""`longnet-dist doctor`: which devices, backends and kernels work on this machine, and why the others do not."""

from __future__ import annotations

import importlib.metadata
import os
import platform

from longnet_dist import __version__
from longnet_dist.extras import extra

_PACKAGES = ("torch", "numpy", "tyro", "rich", "tensorboard", "triton", "flash-attn", "ray")
_HEAD_DIM = 64


def run_doctor(cluster: bool = False, timeout: float = 30.0) -> None:
    """Print which devices, backends and kernels work on this machine, and why the others do not.

    Args:
        cluster: Check the nodes and links of the Ray cluster at RAY_ADDRESS instead; the exit code is 1 on a problem.
        timeout: Time limit for each answer of a node, in seconds; only with --cluster.
    """
    if not cluster:
        print(diagnose_machine())
        return
    with extra("ray", "--cluster"):
        from longnet_dist.integrations.ray.connection import has_no_cluster
        from longnet_dist.integrations.ray.doctor import diagnose_cluster
    if has_no_cluster():
        print("RAY_ADDRESS is not set: starting a cluster on this machine, and checking that one")
    report, problems = diagnose_cluster(timeout)
    print(report)
    if problems:
        raise SystemExit(1)


def diagnose_machine() -> str:
    """Return a report for people: versions, devices, backends, and the kernels for each device and dtype."""
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
            'attention kernels (kernel="auto" takes the first that is usable)',
            *_kernels(),
            "  A position bias needs the eager kernel, the only one that computes its gradient.",
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

    from longnet_dist.attention.kernels import KERNELS, KernelRequest

    lines = []
    for device_type in ("cpu", "cuda"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for name, kernel in KERNELS.items():
                if device_type == "cuda" and not torch.cuda.is_available():
                    reasons = ["there is no GPU"]
                else:
                    reasons = kernel.unsupported(KernelRequest(torch.device(device_type), dtype, _HEAD_DIM))
                verdict = f"no: {'; '.join(reasons)}" if reasons else "usable"
                lines.append(f"  {device_type:5} {str(dtype).removeprefix('torch.'):9} {name:6} {verdict}")
    return lines
