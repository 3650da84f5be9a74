"""A cache of constant size: the past of a causal sequence, for generation and for streams of any length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longnet_dist.attention.arguments import Options, kernel_request
from longnet_dist.attention.autograd import attend
from longnet_dist.attention.bias import PositionBias
from longnet_dist.attention.call import Call, unit_stride
from longnet_dist.attention.kernels import choose_kernel
from longnet_dist.attention.merging import merged_rows
from longnet_dist.attention.rows import as_keys, as_queries, pieces, rectangle
from longnet_dist.distributed.mesh import SequenceMesh, mesh_of
from longnet_dist.plan.blocks import Heads, Plan, Rows
from longnet_dist.plan.past import kept_blocks, misaligned_branch, new_blocks, num_slots, past_blocks
from longnet_dist.plan.pattern import Pattern


class DilatedCache:
    """The keys and values that later tokens of a causal sequence can see in one layer: those of current segments.

    That is at most sum(w / r) rows for each key/value head, whatever came before. All memory is taken at the start.

    Args:
        pattern: the branches.
        batch_size: B.
        num_kv_heads: G.
        head_dim: D.
        device, dtype: those of the keys.

    Example:
        >>> pattern = Pattern((4, 16), (1, 4))
        >>> cache = DilatedCache(pattern, batch_size=1, num_kv_heads=2, head_dim=8)
        >>> q, k, v = torch.randn(3, 1, 100, 2, 8).unbind()
        >>> parts = [dilated_attention(*(x[:, i : i + 10] for x in (q, k, v)), pattern, causal=True, cache=cache)
        ...          for i in range(0, 100, 10)]
        >>> torch.allclose(torch.cat(parts, 1), dilated_attention(q, k, v, pattern, causal=True), atol=1e-5)
        True
        >>> cache.length, cache.num_bytes == cache.max_bytes()
        (100, True)
    """

    def __init__(
        self,
        pattern: Pattern,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.pattern = pattern
        self.length = 0
        """The number of tokens seen."""
        self._slots = [num_slots(branch) for branch in pattern.branches]
        # A head's rows lie together, because kernels read them so: a fifth less time for a token on a CPU.
        shape = 2, batch_size, num_kv_heads, sum(self._slots), head_dim
        self.rows = torch.zeros(shape, device=device, dtype=dtype)
        """Keys and values: (2, B, G, slots, D). The slots of the first branch come first."""

    @property
    def num_bytes(self) -> int:
        """The bytes that the cache holds."""
        return self.rows.nbytes

    def max_bytes(self) -> int:
        """The most bytes that the cache ever holds: 2 B G D sum(w / r) elements."""
        _, batch, heads, _, dim = self.rows.shape
        return 2 * batch * sum(self._slots) * heads * dim * self.rows.itemsize

    def reset(self) -> None:
        """Forget all tokens."""
        self.length = 0

    def reorder(self, sequences: Tensor) -> None:
        """Continue each sequence of the batch from another one, as beam search does.

        Args:
            sequences: the number of the sequence to continue, (B',), int64. B' may differ from B.
        """
        self.rows = self.rows.index_select(1, sequences.to(self.rows.device))

    def branch_rows(self, number: int) -> Tensor:
        """Return the keys and values of a branch: (2, B, slots, G, D), a view."""
        return self._of_branch(self.rows, number)

    def _of_branch(self, rows: Tensor, number: int) -> Tensor:
        return rows.narrow(3, sum(self._slots[:number]), self._slots[number]).transpose(2, 3)

    def append(self, k: Tensor, v: Tensor, mesh: SequenceMesh | None = None) -> None:
        """Keep what later tokens can see of new rows, (B, L, G, D). With a mesh, collective: every rank keeps all.

        Args:
            k, v: the keys and values of the rows after `length`; with a mesh, this rank's rows of them.
            mesh: the ranks that hold the new rows.
        """
        if mesh is None or mesh.everyone is None:
            end = self.length + k.shape[1]
            self._copy(k, v, self.length, end, end, self.rows)
        else:
            end = self.length + mesh.seq_len
            first, stop = self.length + mesh.shard.start, self.length + mesh.shard.stop
            gathered = torch.zeros_like(self.rows)
            self._copy(k, v, first, stop, end, gathered)
            mesh.everyone.all_reduce(gathered, "gathering the rows that a cache keeps")
            for block in kept_blocks(self.pattern, k.shape[2], self.length, end, end):
                both = self.branch_rows(block.branch), self._of_branch(gathered, block.branch)
                for target, source in zip(*both, strict=True):
                    places = block.heads, block.slots
                    rectangle(target, *places).copy_(rectangle(source, *places))
        self.length = end

    def _copy(self, k: Tensor, v: Tensor, lo: int, hi: int, end: int, into: Tensor) -> None:
        """Copy what is kept of the rows [lo, hi), of which k and v hold all, after `end` rows in all."""
        for block in kept_blocks(self.pattern, k.shape[2], lo, hi, end) if lo < hi else ():
            for target, x in zip(self._of_branch(into, block.branch), (k, v), strict=True):
                rectangle(target, block.heads, block.slots).copy_(rectangle(x, block.heads, block.rows))

    def state_dict(self) -> dict[str, Any]:
        """Return the state, to save it: the pattern, the length and the rows."""
        return {"pattern": str(self.pattern), "length": self.length, "rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state of a cache of the same pattern and sizes.

        Raises:
            ValueError: for a state of another cache.
        """
        rows = state["rows"]
        theirs, ours = (state["pattern"], rows.shape, rows.dtype), (str(self.pattern), self.rows.shape, self.rows.dtype)
        if theirs != ours:
            raise ValueError(f"the state is of a cache of {theirs}, and this one is of {ours}")
        self.rows.copy_(rows)
        self.length = int(state["length"])


def problem_of_cache(
    cache: DilatedCache, q: Tensor, k: Tensor, v: Tensor, bias: PositionBias | None, options: Options, documents: bool
) -> str | None:
    """Describe why a call cannot continue from a cache; None if it can."""
    if not isinstance(cache, DilatedCache):
        return f"cache is a {type(cache).__name__}; it must be a longnet_dist.DilatedCache"
    if not options.causal:
        return "a cache holds the past, so attention must be causal: pass causal=True"
    if documents:
        return "a cache does not go together with cu_seqlens or lengths: use a cache for each document"
    if options.total_kv_heads:
        return "a cache does not go together with sharded heads"
    if options.pattern != cache.pattern:
        return f"the pattern {options.pattern} is not the cache's, {cache.pattern}"
    _, batch, heads, _, dim = cache.rows.shape
    if (batch, heads, dim) != (len(k), *k.shape[2:]) or (cache.rows.dtype, cache.rows.device) != (k.dtype, k.device):
        sizes = f"({batch}, L, {heads}, {dim}), {cache.rows.dtype} on {cache.rows.device}"
        return f"k is {tuple(k.shape)}, {k.dtype} on {k.device}, and the cache is for (B, L, G, D) = {sizes}"
    inputs = q, k, v, *(() if bias is None else (bias.parameters,))
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return "a cache is for inference, without gradients: call under torch.no_grad()"
    mesh = mesh_of(options.mesh)
    branch = None if mesh is None else misaligned_branch(cache.pattern, cache.length, mesh.seq_len)
    if mesh is not None and branch is not None:
        return (
            f"{mesh.seq_len} tokens over ranks, after {cache.length}, do not begin a segment of the branch {branch}, "
            "nor lie in one at a multiple of its rate: read parts of a length that divides longer segments, and is a "
            "multiple of shorter ones"
        )
    return None


def attend_after(
    q: Tensor, k: Tensor, v: Tensor, bias: PositionBias | None, options: Options, cache: DilatedCache
) -> tuple[Tensor, Tensor]:
    """Attend from new rows to themselves and to the past, and append them to it: (out, lse).

    One row alone is appended first, and so sees itself as a part of the past.
    """
    mesh, start = mesh_of(options.mesh), cache.length
    call = Call(
        Plan((), (), ()),
        choose_kernel(options.kernel, kernel_request(q, bias)),
        None,
        True,
        options.scale,
        bias,
        k.shape[2],
        False,
    )
    q, k, v = (unit_stride(x) for x in (q, k, v))
    q_BLGRD = call.by_kv_head(q)
    merged = merged_rows(q_BLGRD, 1 << 30)
    lo, hi = (start, start + q.shape[1]) if mesh is None else (start + mesh.shard.start, start + mesh.shard.stop)
    is_single = mesh is None and q.shape[1] == 1
    if is_single:
        cache.append(k, v)
    elif mesh is None:
        for block in new_blocks(cache.pattern, k.shape[2], start, hi):
            for heads, rows in pieces(block.heads, block.rows):
                keys = [rectangle(x, heads, rows) for x in (k, v)]
                _attend(call, merged, block.branch, heads, rows, rows, rectangle(q_BLGRD, heads, rows), keys, True)
    else:
        out, lse = attend(q, k, v, None if bias is None else bias.parameters, None, options)
        if out.numel():
            heads, rows = Heads(0, 1, 0, k.shape[2], 1), Rows(0, 0, 1, q.shape[1], 0, 1)
            merged.merge(0, heads, rows, call.by_kv_head(out), call.by_kv_head(lse))
    for past in past_blocks(cache.pattern, k.shape[2], start, start + is_single, lo, hi):
        keys = [rectangle(x, past.heads, past.slots) for x in cache.branch_rows(past.branch)]
        queries = rectangle(q_BLGRD, past.heads, past.rows)
        _attend(call, merged, past.branch, past.heads, past.rows, past.slots, queries, keys, False)
    if not is_single:
        cache.append(k, v, mesh)
    out, lse = merged.result()
    return out.to(q.dtype).reshape(q.shape), lse.reshape(q.shape[:-1])


def _attend(
    call: Call,
    merged: Any,
    branch: int,
    heads: Heads,
    rows: Rows,
    key_rows: Rows,
    queries: Tensor,
    keys: list[Tensor],
    causal: bool,
) -> None:
    q, (k, v) = as_queries(queries), (as_keys(x) for x in keys)
    bias = call.bias_of(heads.table, [rows], [key_rows], len(q))
    out, lse = call.kernel.forward(q, k, v, causal=causal, scale=call.scale, bias=bias)
    merged.merge(branch, heads, rows, out, lse.transpose(1, 2))
