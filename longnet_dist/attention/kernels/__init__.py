"""Dense attention on rectangles: the kernels by name, and the choice among them.

To add a kernel, write a module that satisfies `contract.Kernel` and name it in `KERNELS`.
"""

from __future__ import annotations

from longnet_dist.attention.kernels import eager, torch_flash, triton
from longnet_dist.attention.kernels.contract import Kernel, KernelRequest, RectangleBias

__all__ = ["KERNELS", "Kernel", "KernelRequest", "RectangleBias", "choose_kernel"]

KERNELS: dict[str, Kernel] = {"torch": torch_flash, "triton": triton, "eager": eager}
"""All kernels, fastest first: `kernel="auto"` takes the first that serves the request."""


def choose_kernel(name: str, request: KernelRequest) -> Kernel:
    """Return the kernel of this name, or for "auto" the first that serves the request.

    Raises:
        ValueError: for an unknown name, or if no kernel serves the request, with every reason.
    """
    if name not in ("auto", *KERNELS):
        raise ValueError(f"kernel is {name!r}; it must be one of auto, {', '.join(KERNELS)}")
    candidates = KERNELS if name == "auto" else {name: KERNELS[name]}
    refusals = {}
    for candidate, kernel in candidates.items():
        reasons = kernel.unsupported(request)
        if not reasons:
            return kernel
        refusals[candidate] = ", ".join(reasons)
    details = "; ".join(f"{candidate}: {reasons}" for candidate, reasons in refusals.items())
    raise ValueError(f'no kernel for {request}: {details}. kernel="auto" chooses one that works, if there is one')
