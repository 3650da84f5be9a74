"""The arguments of a call: how the operators take them, what is wrong with them, and whether all ranks agree."""

from __future__ import annotations

from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor

from longnet_dist.attention.bias import PositionBias
from longnet_dist.attention.documents import problem_of_offsets
from longnet_dist.attention.kernels import KernelRequest, choose_kernel
from longnet_dist.distributed.digest import digest
from longnet_dist.distributed.mesh import mesh_of
from longnet_dist.plan.blocks import Plan, make_plan
from longnet_dist.plan.pattern import Pattern
from longnet_dist.plan.shard import Shard

_SCHEMA_TYPES = {list[int]: "int[]", int: "int", float: "float", bool: "bool", str: "str"}


class Options(NamedTuple):
    """The operators' arguments that are not tensors: the one definition of their order, names and types.

    This rank's key/value heads begin with number `first_kv_head` of `total_kv_heads` (0 if this rank has
    all heads). `bias` is `PositionBias.spec`, or empty. `mesh` is `SequenceMesh.handle`; 0 stands for none.
    """

    segment_lengths: list[int]
    dilation_rates: list[int]
    head_phases: str
    causal: bool
    scale: float
    kernel: str
    bias: str
    first_kv_head: int
    total_kv_heads: int
    mesh: int

    @property
    def pattern(self) -> Pattern:
        """The branches."""
        return Pattern(tuple(self.segment_lengths), tuple(self.dilation_rates), self.head_phases)

    def plan(self, shard: Shard, num_kv_heads: int, strategies: tuple[str, ...], documents: tuple[int, ...]) -> Plan:
        """Make the plan of a rank that holds `shard` and this many key/value heads."""
        heads = num_kv_heads, self.causal, self.first_kv_head, self.total_kv_heads
        return make_plan(self.pattern, shard, *heads, strategies, documents)


SCHEMA = ", ".join(f"{_SCHEMA_TYPES[hint]} {name}" for name, hint in get_type_hints(Options).items())
"""`Options` as the end of an operator's schema."""


def kernel_request(q: Tensor, bias: PositionBias | None) -> KernelRequest:
    """Return what a call asks of a kernel."""
    by_distance = bias is None or bias.by_distance
    return KernelRequest(q.device, q.dtype, q.shape[-1], bias=bias is not None, bias_by_distance=by_distance)


def agree(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_parameters: Tensor | None,
    cu_seqlens: Tensor | None,
    options: Options,
    problem_of_offsets: str | None,
) -> None:
    """Check that every rank of the mesh passes the same valid arguments.

    Collective. On NCCL groups it exchanges nothing after the first call with these arguments.

    Raises:
        ValueError: on every rank, naming what differs, or the rank whose arguments are invalid and why.
    """
    mesh = mesh_of(options.mesh)
    assert mesh is not None
    tensors = (q, k, v, bias_parameters)
    facts = {
        "pattern": str(options.pattern),
        "causal": options.causal,
        "scale": options.scale,
        "q (batch, heads, head dim)": [q.shape[0], *q.shape[2:]],
        "k (batch, heads, head dim)": [k.shape[0], *k.shape[2:]],
        "heads": [options.first_kv_head, options.total_kv_heads],
        "dtype": str(q.dtype),
        "device": q.device.type,
        "position bias": None if bias_parameters is None else [options.bias, *bias_parameters.shape],
        "requires grad": any(x is not None and x.requires_grad for x in tensors),
        "documents (a digest of their offsets)": None if cu_seqlens is None else digest(cu_seqlens),
    }
    bias = None if bias_parameters is None else PositionBias.from_spec(options.bias, bias_parameters)
    mesh.agree(facts, problem(q, k, v, bias, options) or problem_of_offsets)


def offsets_problem(q: Tensor, cu_seqlens: Tensor | None, options: Options) -> str | None:
    """Describe why offsets cannot be those of documents, which a compiled call does not know before; None if they can.

    The last document may end before the sequence does.
    """
    if cu_seqlens is None:
        return None
    mesh = mesh_of(options.mesh)
    num_tokens = q.shape[1] if mesh is None else mesh.seq_len
    return problem_of_offsets("cu_seqlens", cu_seqlens.tolist(), num_tokens, may_end_before=True)


def problem(q: Tensor, k: Tensor, v: Tensor, bias: PositionBias | None, options: Options) -> str | None:
    """Describe what is wrong with the arguments of a call; None if nothing is.

    While a call is compiled, kernels are not asked: they look for packages and GPUs, which cannot be traced. They are
    asked when the operator runs.
    """
    message = _shape_problem(q, k, v) or _mesh_problem(q, options)
    if message:
        return message
    if bias is not None and (message := bias.problem(q.shape[2], options.causal)):
        return message
    if not torch.compiler.is_compiling():
        try:
            choose_kernel(options.kernel, kernel_request(q, bias))
        except ValueError as error:
            return str(error)
    return None


def _shape_problem(q: Tensor, k: Tensor, v: Tensor) -> str | None:
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
        descriptions = ", ".join(f"{name} {x.dtype} on {x.device}" for name, x in (("q", q), ("k", k), ("v", v)))
        return f"{descriptions}: q, k and v must have one dtype and one device"
    return None


def _mesh_problem(q: Tensor, options: Options) -> str | None:
    mesh = mesh_of(options.mesh)
    if mesh is None:
        return None
    if options.pattern != mesh.pattern:
        return (
            f"the pattern {options.pattern} is not the mesh's, {mesh.pattern}; pass mesh.pattern, or make a mesh for it"
        )
    types = [q.device.type] if mesh.everyone is None else mesh.everyone.device_types
    if q.device.type not in types:
        return (
            f"q is on {q.device}, and the ranks of the mesh exchange tensors on {' and '.join(types)}: move q, k and v "
            "there, or make the process group with another backend"
        )
    if q.shape[1] != mesh.shard.num_rows:
        return mesh.wrong_rows("q", q.shape[1])
    return None
