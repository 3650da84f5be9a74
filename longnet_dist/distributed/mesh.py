"""SequenceMesh: which rows of a sequence each rank of a group holds, and the communicators that a pattern needs."""

from __future__ import annotations

import itertools
import numbers
import threading
import warnings
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from functools import lru_cache
from typing import Any, NoReturn
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from longnet_dist import internals
from longnet_dist.distributed import collectives
from longnet_dist.distributed.differentiable import Join, Split, Sum, holds_ids
from longnet_dist.distributed.digest import digest
from longnet_dist.distributed.liveness import this_process
from longnet_dist.distributed.mesh_arguments import problem, process_group
from longnet_dist.plan.cost import LayerSize, choose_strategies
from longnet_dist.plan.exchange import SharedSegment
from longnet_dist.plan.hardware import HARDWARE, Hardware
from longnet_dist.plan.pattern import Pattern
from longnet_dist.plan.shard import Shard, choose_chunk, rank_groups
from longnet_dist.plan.sharing import saved_latency

_choose_strategies = lru_cache(maxsize=256)(choose_strategies)
_saved_latency = lru_cache(maxsize=256)(saved_latency)
_MAX_COMPARED = 8
"""The number of tensors that are compared at once, the last ones that were split."""
_HANDLES = itertools.count(1)
_BY_HANDLE: WeakValueDictionary[int, SequenceMesh] = WeakValueDictionary()
"""The living meshes by handle, because operators take no Python objects (docs/decisions/custom-op.md)."""


class SequenceMesh:
    """A sequence of `seq_len` tokens, held in contiguous chunks by the ranks of a group.

    Construction is collective over `group`. Several meshes, of different patterns, lengths or groups, can
    be used together, if all their ranks call them in the same order.

    Args:
        group: a ProcessGroup, a one-dimensional DeviceMesh, or None if this process holds whole sequences. With
            WORLD_SIZE above 1 in the environment, None is an error before `init_process_group`, because
            `torch.distributed.group.WORLD` is None then, and each process would work alone.
        pattern: the branches that will be attended; they decide the chunk and which ranks communicate.
        seq_len: N, the global number of tokens; any number, even fewer than ranks.
        chunk: rows per rank; by default chosen so that the pattern's segments align with chunks.
        strategy: how queries meet the keys of other ranks: "all_gather", "all_to_all", "exchange", or one
            of them for each branch. "auto" chooses for each branch (docs/decisions/strategies.md).
        hardware: the speed by which "auto" compares strategies; by default that of a CPU core for groups on
            CPUs, and of an H100 otherwise.
        keep_kv: whether to keep what other ranks sent for the backward, instead of sending it again. By
            default it is kept where that takes little memory (docs/decisions/regather-or-keep.md).
        reduce_dtype: the dtype in which dK and dV are sent and summed, unless that of K and V is wider.
        timeout: the time limit of each collective, in seconds or as a timedelta.

    Raises:
        ValueError: on every rank, for arguments that cannot work, or that differ between ranks; for a group of None
            among several processes without a process group.

    Example:
        >>> mesh = SequenceMesh(None, Pattern((4, 8), (1, 2)), seq_len=10)
        >>> mesh.shard.start, mesh.shard.stop
        (0, 10)
    """

    def __init__(
        self,
        group: ProcessGroup | DeviceMesh | None,
        pattern: Pattern,
        seq_len: int,
        *,
        strategy: str | Sequence[str] = "auto",
        chunk: int | None = None,
        hardware: Hardware | None = None,
        keep_kv: bool | None = None,
        reduce_dtype: torch.dtype = torch.float32,
        timeout: timedelta | float = timedelta(minutes=10),
    ) -> None:
        timeout = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
        self.group = process_group(group)
        self.pattern = pattern
        self.seq_len = int(seq_len) if isinstance(seq_len, numbers.Integral) else seq_len
        self.strategy = strategy if isinstance(strategy, str) else tuple(strategy)
        self.keep_kv = keep_kv
        self.reduce_dtype = reduce_dtype
        self.size = 1 if self.group is None else dist.get_world_size(self.group)
        self.rank = 0 if self.group is None else dist.get_rank(self.group)
        self.everyone = None if self.group is None else collectives.Communicator(self.group, timeout, self.rank)
        on_gpu = self.group is not None and collectives.uses_nccl(self.group)
        self.hardware = hardware or HARDWARE["h100" if on_gpu else "cpu"]
        self._agreed: set[Any] = set()
        self._batch = threading.local()  # A thread that prefetches is ahead of the thread that trains.
        self._facts = {"pattern": str(pattern), "seq_len": self.seq_len, "chunk": chunk, "keep_kv": keep_kv}
        self._facts |= {"strategy": str(self.strategy), "hardware": str(hardware)}
        self._facts |= {"reduce_dtype": str(reduce_dtype), "timeout": timeout.total_seconds()}
        self.agree({"call": "SequenceMesh"}, problem(pattern, seq_len, chunk, self.size, self.strategy))
        if self.rank == 0 and self.seq_len > pattern.reach(self.seq_len):
            warnings.warn(
                f"no token sees further than {pattern.reach(self.seq_len):,} tokens: the longest segment is shorter "
                f"than seq_len = {self.seq_len:,}; Pattern.geometric(max_length={self.seq_len}) has longer ones",
                stacklevel=2,
            )
        self.shard = Shard(self.seq_len, chunk or choose_chunk(pattern, self.seq_len, self.size), self.rank, self.size)
        self._facts["chunk"] = self.shard.chunk
        self._communicators: dict[tuple[int, int], collectives.Communicator] = {}
        if self.group is not None and self.everyone is not None:
            facts = torch.tensor([internals.num_process_groups(), *this_process()], device=self.everyone.device)
            by_rank = self.everyone.all_gather(facts, "counting process groups").wait().tolist()
            collectives.pad_process_groups(max(count for count, *_ in by_rank))
            processes = [(machine, pid) for _, machine, pid in by_rank]
            self.everyone.processes = dict(enumerate(processes))
            rounds = rank_groups(pattern, self.shard)
            self._communicators = collectives.communicators(self.group, rounds, timeout, processes)
        self.handle = next(_HANDLES)
        _BY_HANDLE[self.handle] = self

    def strategies(self, layer: LayerSize) -> tuple[str, ...]:
        """Return the strategy of each branch for a layer of these sizes; the same on every rank."""
        names = (self.strategy,) * len(self.pattern.branches) if isinstance(self.strategy, str) else self.strategy
        if "auto" not in names:
            return names
        chosen = _choose_strategies(self.pattern, self.shard.of(0), layer, self.hardware, self.keep_kv)
        return tuple(best if name == "auto" else name for name, best in zip(names, chosen, strict=True))

    def shares_collectives(self, layer: LayerSize) -> bool:
        """Return whether collectives between the same ranks become one; the same on every rank."""
        strategies = self.strategies(layer)
        return _saved_latency(self.pattern, strategies, self.shard.of(0), layer, self.hardware, self.keep_kv) > 0

    @property
    def exposed_seconds(self) -> float:
        """The time, so far, in which this rank waited for collectives of these ranks and computed nothing.

        It includes other meshes of the same ranks and time limit, and the waits for slower ranks.
        """
        communicators = [*self._communicators.values(), *([] if self.everyone is None else [self.everyone])]
        return sum(communicator.waited.seconds for communicator in communicators)

    def communicator(self, segment: SharedSegment) -> collectives.Communicator:
        """Return the communicator of the ranks that hold this segment."""
        return self._communicators[segment.first_rank, segment.last_rank]

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """Return the global positions of this rank's rows: int64, (L,)."""
        return torch.arange(self.shard.start, self.shard.stop, device=device)

    def split(self, x: Tensor, dim: int = 1) -> Tensor:
        """Take this rank's chunk of a tensor that every rank holds whole; differentiable.

        The backward is collective: it gathers the gradient of `x`, so that every rank has the whole
        gradient, as one process would.

        Ranks whose tokens, labels or masks differ would train on a mixture of sequences. So if `x` has integers or
        booleans, the next collective of this thread compares its digest (of tensors on a GPU only the first).

        Args:
            x: a tensor with N entries in `dim`, of any dtype, the same on every rank.
            dim: the dimension of the sequence.

        Returns:
            A copy of the rows [shard.start, shard.stop) of `dim`, which may be none.

        Raises:
            ValueError: if `x` does not have N entries in `dim`.

        Example:
            >>> SequenceMesh(None, Pattern((4,), (1,)), seq_len=6).split(torch.zeros(2, 6, 3)).shape
            torch.Size([2, 6, 3])
        """
        if x.shape[dim] != self.seq_len:
            raise ValueError(
                f"mesh.split takes the whole sequence: dim {dim} of {tuple(x.shape)} has {x.shape[dim]} entries, "
                f"not seq_len = {self.seq_len}. (To join chunks, use mesh.join.)"
            )
        if self.everyone is not None and holds_ids(x) and (x.device.type == "cpu" or not vars(self._batch)):
            vars(self._batch).setdefault("split", deque(maxlen=_MAX_COMPARED)).append(x)
        return Split.apply(x, self, dim)

    def join(self, x: Tensor, dim: int = 1) -> Tensor:
        """Join the chunks of all ranks to the whole tensor, on every rank; differentiable. Collective.

        Every rank must compute the same from the result: the backward takes this rank's rows of its own
        gradient, and sums nothing over ranks.

        Args:
            x: this rank's chunk, with its number of rows in `dim`; any dtype that the backend supports.
            dim: the dimension of the sequence.

        Returns:
            The whole tensor, with N entries in `dim`.

        Raises:
            ValueError: on every rank, if one of them passes a wrong number of rows, or they disagree.
        """
        return Join.apply(x, self, dim)

    def sum(self, x: Tensor) -> Tensor:
        """Sum `x` over the ranks; every rank gets the result. Collective.

        The gradient of `x` is that of the result, unchanged: each rank computes its part of a parameter's
        gradient; see `token_mean`.

        Args:
            x: a tensor of the same shape on every rank.

        Raises:
            ValueError: on every rank, if shapes, dtypes or devices differ.
        """
        return x if self.everyone is None else Sum.apply(x, self)

    def token_mean(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Average `values` over the unmasked tokens of all ranks; every rank gets the result. Collective.

        Each token has the same weight, though chunks may be uneven or empty. On each rank, the gradient of
        a parameter comes from the rank's own tokens. So the *sum* of these gradients over ranks is the
        gradient of one process. (DistributedDataParallel averages over ranks: multiply the loss by their number.)

        Args:
            values: this rank's values, of any shape, for example the losses of its tokens.
            mask: bool, with the shape of `values`: true for tokens that count, by default all.

        Returns:
            A scalar, differentiable; 0 if no token counts on any rank.

        Raises:
            ValueError: on every rank, if a mask has the wrong shape or dtype, or dtypes differ.
        """
        if mask is not None and (mask.shape != values.shape or mask.dtype != torch.bool):
            refuse(
                f"mask is {mask.dtype} of shape {tuple(mask.shape)}; it must be bool, of the shape of values, "
                f"{tuple(values.shape)}",
                self,
            )
        # Selected, not multiplied by the mask, which would let the NaN of a masked token through.
        selected = values if mask is None else torch.where(mask, values, 0)
        # Created on the device of `values`, because a CUDA graph cannot capture a copy from the host.
        number = values.new_full((), values.numel(), dtype=torch.float64) if mask is None else mask.sum().double()
        count = self.sum(number)
        total = self.sum(selected.sum(dtype=torch.promote_types(values.dtype, torch.float32)))
        return total / count.clamp(min=1).to(total.dtype)

    def agree(self, facts: dict[str, Any], problem: str | None = None, *, always: bool = False) -> bool:
        """Check that every rank passes the same `facts` to a mesh with the same arguments. Collective.

        A comparison blocks the host. So on GPUs the same facts are compared only once, and again after each `split` of
        integers on a CPU. Another disagreement is a timeout there.

        Args:
            facts: a small dict of what must be the same on every rank, by its name in errors. "device" is the type of
                the call's device, if that may differ from the group's.
            problem: what is wrong on this rank, or None.
            always: whether to compare in every call, on GPUs too.

        Returns:
            Whether the facts were compared.

        Raises:
            ValueError: on every rank, if ranks differ or one has a `problem`.
        """
        if self.everyone is None:
            if problem:
                raise ValueError(problem)
            return False
        key, split = str(facts), vars(self._batch).get("split")
        if problem is None and key in self._agreed and not split:
            return False
        if split:
            self._batch.facts = {"the batch given to mesh.split (by a digest)": digest(list(split))}
            split.clear()
        of_mesh = {f"the mesh's {name}": value for name, value in self._facts.items()}
        self.everyone.agree(of_mesh | getattr(self._batch, "facts", {}) | facts, problem)
        if not always and "cuda" in (facts.get("device"), self.everyone.device.type):
            self._agreed = self._agreed if len(self._agreed) < 4096 else set()  # Documents are new in every step.
            self._agreed.add(key)
        return True

    def wrong_rows(self, name: str, num_rows: int) -> str:
        """Return the error message for a tensor that does not have this rank's number of rows."""
        return (
            f"{name} has {num_rows} rows, and this rank holds {self.shard.num_rows}, [{self.shard.start}, "
            f"{self.shard.stop}) of {self.seq_len}; pass mesh.split(x), not the whole sequence"
        )

    def __copy__(self) -> SequenceMesh:
        """Return the mesh itself, which never changes, so that modules that hold one can be copied."""
        return self

    def __deepcopy__(self, memo: Any) -> SequenceMesh:
        """Return the mesh itself; see `__copy__`."""
        return self

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled: another process has neither these connections nor this handle."""
        raise TypeError(
            "a SequenceMesh cannot be pickled or saved, because it is this process's place among its ranks: save "
            "module.state_dict() instead of the module, and construct SequenceMesh(group, pattern, seq_len) in each "
            "process that needs one"
        )

    def __repr__(self) -> str:
        return (
            f"SequenceMesh(rank {self.rank} of {self.size}, rows [{self.shard.start}, {self.shard.stop}) "
            f"of {self.seq_len}, pattern {self.pattern})"
        )


def refuse(problem: str, mesh: SequenceMesh | None) -> NoReturn:
    """Raise ValueError, on every rank if there is a mesh."""
    if mesh is not None and not torch.compiler.is_compiling():
        mesh.agree({}, problem)
    raise ValueError(problem)


def mesh_of(handle: int) -> SequenceMesh | None:
    """Return the mesh with this handle; None for 0, which stands for no mesh."""
    return _BY_HANDLE[handle] if handle else None
