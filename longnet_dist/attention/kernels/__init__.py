"""Dense attention on rectangles: the kernels by name, and the choice among them.

To add a kernel, write a module that satisfies `contract.Kernel` and name it in `KERNELS`.
"""

from __future__ import annotations

from longnet_dist.attention.kernels import cudnn, eager, flash, torch_flash, triton
from longnet_dist.attention.kernels.contract import Kernel, KernelRequest, RectangleBias

__all__ = ["KERNELS", "ONLY_BY_NAME", "WHY", "Kernel", "KernelRequest", "RectangleBias", "choose_kernel"]

KERNELS: dict[str, Kernel] = {
    "flash": flash,
    "torch": torch_flash,
    "triton": triton,
    "eager": eager,
    "cudnn": cudnn,
}
"""All kernels. `kernel="auto"` takes the first that serves the request, but none of `ONLY_BY_NAME`."""

WHY = {
    "flash": "the FlashAttention that was installed for this GPU",
    "torch": "the flash attention that torch is built with, on CPUs and GPUs",
    "triton": "serves float32, position biases and any head dim up to 256 on GPUs",
    "eager": "plain math, for all that no other kernel serves",
    "cudnn": "cuDNN's attention, which suits a few shapes that come again and again",
}
"""What each kernel is for: the reason for its place in the order."""

ONLY_BY_NAME = frozenset({"cudnn"})
"""Kernels that `kernel="auto"` never takes: cuDNN compiles a plan for each shape, whose cost was not measured."""


def choose_kernel(name: str, request: KernelRequest) -> Kernel:
    """Return the kernel of this name, or for "auto" the first that serves the request.

    Raises:
        ValueError: for an unknown name, or if no kernel serves the request, with every reason.
    """
    if name not in ("auto", *KERNELS):
        raise ValueError(f"kernel is {name!r}; it must be one of auto, {', '.join(KERNELS)}")
    candidates = [x for x in KERNELS if x not in ONLY_BY_NAME] if name == "auto" else [name]
    refusals = {}
    for candidate in candidates:
        reasons = KERNELS[candidate].unsupported(request)
        if not reasons:
            return KERNELS[candidate]
        refusals[candidate] = ", ".join(reasons)
    details = "; ".join(f"{candidate}: {reasons}" for candidate, reasons in refusals.items())
    raise ValueError(f'no kernel for {request}: {details}. kernel="auto" chooses one that works, if there is one')
