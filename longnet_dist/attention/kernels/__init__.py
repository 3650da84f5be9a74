"""Dense attention on rectangles. Kernels know no dilation, ranks or groups.

A kernel is a module with

    forward(q_bIHD, k_bJGD, v_bJGD, *, causal, scale, bias) -> (out_bIHD, lse_bHI)
    backward(dout_bIHD, q, k, v, out, lse_bHI, *, causal, scale, bias) -> (dq, dk, dv, dbias)
    unsupported(device, dtype, head_dim, has_bias) -> list[str]

H is a multiple of G; `causal` comes only with I = J and is the diagonal of that square; lse is the
natural log, float32 (float64 for float64). The backward is given `out` and `lse` of *all* branches
merged: the ordinary flash backward is then the exact gradient through the mixing (docs/decisions).
"""

from __future__ import annotations

from types import ModuleType

import torch

from longnet_dist.attention.kernels import eager, torch_flash

KERNELS: dict[str, ModuleType] = {"torch": torch_flash, "eager": eager}
"""By name, fastest first: `kernel="auto"` takes the first that has no reason against it."""


def choose_kernel(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, has_bias: bool) -> ModuleType:
    """The kernel of this name, or the first usable for "auto".

    Raises:
        ValueError: for an unknown name, or a named kernel that cannot compute this, with every reason.
    """
    if name not in ("auto", *KERNELS):
        raise ValueError(f"kernel is {name!r}; it must be one of auto, {', '.join(KERNELS)}")
    reasons = {
        candidate: KERNELS[candidate].unsupported(device, dtype, head_dim, has_bias)
        for candidate in (KERNELS if name == "auto" else [name])
    }
    for candidate, against in reasons.items():
        if not against:
            return KERNELS[candidate]
    lines = "; ".join(f"{candidate}: {', '.join(against)}" for candidate, against in reasons.items())
    raise ValueError(
        f"no kernel for {dtype} on {device.type} with head dim {head_dim}{' and a relative bias' if has_bias else ''}: "
        f'{lines}. kernel="auto" chooses one that works, where there is one'
    )
