"""What a call is given: what is wrong with it, in words, and whether all ranks of a mesh give the same."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from longnet_dist.attention.bias import check_relative_bias
from longnet_dist.attention.kernels import choose_kernel
from longnet_dist.distributed.mesh import mesh_of
from longnet_dist.plan.blocks import Plan, make_plan
from longnet_dist.plan.pattern import Pattern
from longnet_dist.plan.shard import Shard

SCHEMA = (
    "int[] segment_lengths, int[] dilation_rates, str head_phases, bool causal, float scale, str kernel, "
    "int rel_bias_max_distance, int first_kv_head, int total_kv_heads, int mesh"
)
"""Of `Options`, as torch writes an operator's arguments."""


class Options(NamedTuple):
    """The arguments of the operators that are not tensors, in their order.

    The heads given are those from `first_kv_head` on of `total_kv_heads`, 0 where they are all; `mesh` is a handle, 0
    for none.
    """

    segment_lengths: list[int]
    dilation_rates: list[int]
    head_phases: str
    causal: bool
    scale: float
    kernel: str
    rel_bias_max_distance: int
    first_kv_head: int
    total_kv_heads: int
    mesh: int

    @property
    def pattern(self) -> Pattern:
        """The branches."""
        return Pattern(tuple(self.segment_lengths), tuple(self.dilation_rates), self.head_phases)

    def plan(self, shard: Shard, num_kv_heads: int) -> Plan:
        """What a rank that holds `shard`, and this many heads, does."""
        return make_plan(self.pattern, shard, num_kv_heads, self.causal, self.first_kv_head, self.total_kv_heads)


def agree(q: Tensor, k: Tensor, v: Tensor, rel_bias: Tensor | None, options: Options) -> None:
    """Every rank of the mesh gives the same, and nothing is wrong with it, or every rank raises.

    Collective on the first call that looks like this one, and nothing after.

    Raises:
        ValueError: on every rank, naming what differs, or the rank and what is wrong there.
    """
    mesh = mesh_of(options.mesh)
    assert mesh is not None
    shapes = {
        "q (batch, heads, head dim)": [q.shape[0], *q.shape[2:]],
        "k (batch, heads, head dim)": [k.shape[0], *k.shape[2:]],
        "heads": [options.first_kv_head, options.total_kv_heads],
        "dtype": str(q.dtype),
        "device": q.device.type,
        "relative bias": None if rel_bias is None else [*rel_bias.shape, options.rel_bias_max_distance],
        "requires grad": any(x is not None and x.requires_grad for x in (q, k, v, rel_bias)),
    }
    given = {"pattern": str(options.pattern), "causal": options.causal, "scale": options.scale} | shapes
    mesh.agree(given, problem(q, k, v, rel_bias, options))


def problem(q: Tensor, k: Tensor, v: Tensor, rel_bias: Tensor | None, options: Options) -> str | None:
    """What is wrong with the arguments of a call, in words; None where nothing is."""
    found = _wrong_shapes(q, k, v) or _wrong_for_mesh(q, options)
    if found:
        return found
    if rel_bias is not None:
        if rel_bias.dim() != 2 or rel_bias.shape[1] != q.shape[2]:
            return f"rel_bias is {tuple(rel_bias.shape)}; it must be (buckets, H) with H = {q.shape[2]}"
        if reasons := check_relative_bias(len(rel_bias), options.rel_bias_max_distance, options.causal):
            return reasons[0]
    try:
        choose_kernel(options.kernel, q.device, q.dtype, q.shape[-1], rel_bias is not None)
    except ValueError as error:
        return str(error)
    return None


def _wrong_shapes(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        return f"{shapes}: q must be (B, N, H, D), and k and v (B, N, G, D), the heads after the tokens"
    if k.shape != v.shape:
        return f"{shapes}: k and v must have the same shape"
    if (q.shape[0], q.shape[1], q.shape[3]) != (k.shape[0], k.shape[1], k.shape[3]):
        return f"{shapes}: q and k must have the same B, N and D"
    if 0 in (q.shape[2], k.shape[2], q.shape[3]):
        return f"{shapes}: there must be at least one head, of at least one dimension"
    if q.shape[2] % k.shape[2]:
        return f"{shapes}: {q.shape[2]} query heads cannot share {k.shape[2]} key/value heads; G must divide H"
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        given = ", ".join(f"{name} {x.dtype} on {x.device}" for name, x in (("q", q), ("k", k), ("v", v)))
        return f"{given}: q, k and v must have one dtype and one device"
    return None


def _wrong_for_mesh(q: Tensor, options: Options) -> str | None:
    mesh = mesh_of(options.mesh)
    if mesh is None:
        return None
    if options.pattern != mesh.pattern:
        return (
            f"the pattern {options.pattern} is not the mesh's, {mesh.pattern}; pass mesh.pattern, or make a mesh for it"
        )
    if q.shape[1] != mesh.shard.num_rows:
        return mesh.wrong_rows("q", q.shape[1])
    return None
