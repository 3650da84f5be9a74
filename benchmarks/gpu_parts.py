"""The parts of `gpu.py`. Each takes the sizes, and a function that writes one row of its results."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpu import one_line
from gpu_timing import Emit, Run, Sizes, attention_run, floor_run, measure, ours, profile, torchscale_style
from measure import dtype_name
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from longnet_dist import LongNetConfig, Pattern, SequenceMesh, dense_reference, dilated_attention, next_token_labels
from longnet_dist.attention.kernels import Kernel
from longnet_dist.distributed import collectives
from longnet_dist.plan.cost import FORWARDS_PER_STEP, LayerSize, attention_flops, branch_traffic
from longnet_dist.plan.hardware import HARDWARE

PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
"""Operations per second in dense bfloat16, from data sheets of the boards with SXM sockets, by a part of the name."""
PASSES = {"forward": False, "forward + backward": True}


def machine(sizes: Sizes, emit: Emit) -> None:
    facts = {"torch": torch.__version__, "python": platform.python_version()}
    if sizes.device == "cuda":
        facts |= {"device": torch.cuda.get_device_name(), "GPUs": torch.cuda.device_count()}
        facts |= {"cuDNN": torch.backends.cudnn.version(), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
    else:
        facts |= {"device": f"{platform.machine()} CPU", "threads": torch.get_num_threads()}
    for name in ("triton", "flash_attn", "flash_attn_interface", "flash_attn.cute", "ring_flash_attn"):
        try:
            facts[name] = getattr(__import__(name, fromlist=["_"]), "__version__", "present")
        except Exception:
            facts[name] = "absent"
    facts["kernels"] = ", ".join(sizes.served(emit))
    for name, value in facts.items():
        emit(fact=name, value=value)


def oracle(sizes: Sizes, emit: Emit) -> None:
    """Emit relative errors of the output and gradients, over those of the same kernel on dense attention.

    Errors are root mean squares over the root mean square of the oracle. Dense attention is one branch as long as the
    sequence, of the same q, k and v. The ratio must be at most 2.
    """
    N = sizes.oracle_len
    pattern = Pattern.geometric(N, base=N // 16, growth=4)
    exact: dict[tuple[Pattern, bool], list[Tensor]] = {}
    for name in sizes.served(emit):
        for causal in (True, False):
            try:
                errors = {}
                for p in (pattern, Pattern((N,), (1,))):
                    if (p, causal) not in exact:
                        inputs = [x.detach().double().requires_grad_(i < 3) for i, x in enumerate(sizes.inputs(N))]
                        exact[p, causal] = _results(partial(dense_reference, pattern=p, causal=causal), inputs)
                    found = _results(ours(sizes, name, causal, p), sizes.inputs(N))
                    errors[p] = [_relative_error(a, b) for a, b in zip(found, exact[p, causal], strict=True)]
                ratios = [a / b for a, b in zip(*errors.values(), strict=True)]
            except Exception as error:
                emit(kernel=name, causal=causal, failed=one_line(error))
                continue
            named = {key: f"{x:.2f}" for key, x in zip(("out", "dq", "dk", "dv"), ratios, strict=True)}
            dense = f"{max(errors[Pattern((N,), (1,))]):.1e}"
            right = max(ratios) <= 2
            emit(kernel=name, dtype=dtype_name(sizes.dtype), causal=causal, **named, dense_error=dense, at_most_2=right)


def _results(attend: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    q, k, v, dout = inputs
    out = attend(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def _relative_error(x: Tensor, exact: Tensor) -> float:
    return ((x.double() - exact).norm() / exact.norm()).item()


def floor(sizes: Sizes, emit: Emit) -> None:
    """Emit the time of dilated attention over that of the same kernel on blocks that are contiguous already."""
    for name, kernel in sizes.served(emit).items():
        for causal in (True, False):
            for label, backward in PASSES.items():
                runs = {
                    "ours": attention_run(ours(sizes, name, causal), sizes.inputs(), backward),
                    "floor": floor_run(sizes, kernel, causal, backward),
                }
                results = measure(runs, sizes.rounds, sizes.device)
                about = {"kernel": name, "causal": causal, "pass": label}
                if problem := next((f"{who}: {r['failed']}" for who, r in results.items() if "failed" in r), None):
                    emit(**about, failed=problem)
                    continue
                low, high = (results["ours"][f"{which} quartile"] for which in ("lower", "upper"))
                emit(
                    **about, ms=results["ours"]["ms"], quartiles=f"{low} to {high}", host_ms=results["ours"]["host ms"],
                    floor_ms=results["floor"]["ms"], x_floor=round(results["ours"]["ms"] / results["floor"]["ms"], 3),
                    MiB=results["ours"]["MiB"], floor_MiB=results["floor"]["MiB"],
                )  # fmt: skip
                del runs


def peers(sizes: Sizes, emit: Emit) -> None:
    """Emit the times of dense attention, and of a baseline in the way of torchscale, next to ours."""
    for name, kernel in list(sizes.served(emit).items())[:1]:
        _compare_torchscale_style(sizes, name, kernel, emit)
        for causal in (True, False):
            for label, backward in PASSES.items():
                attends = {
                    f"longnet_dist, {name}": ours(sizes, name, causal),
                    f"torchscale style, {name}": partial(
                        torchscale_style, pattern=sizes.pattern, kernel=kernel, causal=causal
                    ),
                    "dense, flash": partial(_dense, causal=causal, backends=[SDPBackend.FLASH_ATTENTION]),
                }
                if sizes.device == "cuda":
                    attends["dense, cuDNN"] = partial(_dense, causal=causal, backends=[SDPBackend.CUDNN_ATTENTION])
                inputs = sizes.inputs()
                runs = {who: attention_run(attend, inputs, backward) for who, attend in attends.items()}
                results = measure(runs, sizes.rounds, sizes.device)
                own = results[f"longnet_dist, {name}"].get("ms")
                for who, result in results.items():
                    ratio = {"x ours": round(result["ms"] / own, 3)} if own and "ms" in result else {}
                    emit(**{"causal": causal, "pass": label, "contestant": who} | result | ratio)


def _dense(q: Tensor, k: Tensor, v: Tensor, causal: bool, backends: list[SDPBackend]) -> Tensor:
    with sdpa_kernel(backends):
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal).transpose(1, 2)


def _compare_torchscale_style(sizes: Sizes, name: str, kernel: Kernel, emit: Emit) -> None:
    """Emit how far the baseline is from ours: the output agrees, and its gradients lack those of the mixing."""
    short = replace(sizes, seq_len=min(sizes.seq_len, 8 * sizes.base))
    theirs = partial(torchscale_style, pattern=short.pattern, kernel=kernel, causal=True)
    names = ("out", "dq", "dk", "dv")
    pairs = zip(*(_results(f, short.inputs()) for f in (theirs, ours(short, name, True))), strict=True)
    errors = {key: f"{_relative_error(a, b.double()):.1e}" for key, (a, b) in zip(names, pairs, strict=True)}
    emit(contestant="torchscale style", **{"pass": "relative difference from ours"}, **errors)


def gpus(sizes: Sizes, emit: Emit) -> None:
    """Emit the times of one rank per GPU, next to ring-flash-attn and torch's context parallel; see `gpu_ranks.py`."""
    if sizes.num_gpus < 2:
        emit(**{"not run": f"{'one GPU' if sizes.device == 'cuda' else 'no GPU'}, and several ranks need one each"})
        return
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={sizes.num_gpus}"]
    command = [sys.executable, *torchrun, str(Path(__file__).with_name("gpu_ranks.py")), *sys.argv[1:]]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}) as job:
        assert job.stdout is not None
        for line in job.stdout:
            if line.startswith("{"):
                emit(**json.loads(line))
    if job.returncode:
        raise RuntimeError(f"torchrun ended with exit status {job.returncode}")


def ranks(sizes: Sizes, emit: Emit) -> None:
    """Emit the time of the middle one of N / chunk ranks, by the paper's three branches and by geometric ones.

    The code is that of real ranks, on torch's fake process group, whose collectives move nothing. What would arrive is
    synthetic: copies of random numbers, in the memory into which the network would write. So the time is that of
    computing and copying; the bytes are the planner's, and the seconds of the network its model of an H100's.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    name = next(iter(sizes.served(emit)))
    layer = LayerSize(sizes.heads, sizes.heads, sizes.head_dim, sizes.dtype.itemsize, causal=True)
    for N in sizes.lengths:
        num_ranks = max(1, N // sizes.chunk)
        dist.init_process_group("fake", rank=num_ranks // 2, world_size=num_ranks, store=FakeStore())
        paper = sorted({min(sizes.base, N), min(sizes.chunk, N), N})
        patterns = {
            "paper": Pattern(tuple(paper), tuple(w // paper[0] for w in paper)),
            "geometric": Pattern.geometric(N, base=sizes.base, growth=4),
        }
        try:
            for which, pattern in patterns.items():
                mesh = SequenceMesh(dist.group.WORLD, pattern, N, chunk=N // num_ranks, hardware=HARDWARE["h100"])
                attend = partial(dilated_attention, pattern=pattern, causal=True, kernel=name, mesh=mesh)
                inputs = sizes.inputs(mesh.shard.num_rows)
                runs = {label: attention_run(attend, inputs, backward) for label, backward in PASSES.items()}
                with _synthetic_arrivals(sizes):
                    results = measure(runs, sizes.rounds, sizes.device)
                traffic = branch_traffic(pattern, mesh.shard, layer, mesh.strategies(layer))
                received = sum(branch.received for branch in traffic)
                buffers = max(sum(t.forward_buffers for t in traffic), sum(t.backward_buffers for t in traffic))
                problem = {f"{label}, failed": r["failed"] for label, r in results.items() if "failed" in r}
                times = {f"{label}, ms": r["ms"] for label, r in results.items() if "ms" in r}
                emit(
                    **{"N": N, "ranks": num_ranks, "branches": f"{len(pattern.branches)}, {which}"}, **times, **problem,
                    MiB=results["forward + backward"].get("MiB"), received_MB=round(received / 1e6, 1),
                    buffers_MB=round(buffers / 1e6, 1),
                    network_ms=round(received / HARDWARE["h100"].bandwidth * 1e3, 3),
                )  # fmt: skip
        finally:
            dist.destroy_process_group()


@contextmanager
def _synthetic_arrivals(sizes: Sizes) -> Iterator[None]:
    """Let collectives of rows return random numbers at once; the fake group would leave their results as they were."""
    noise = torch.randn(1 << 20, dtype=torch.float32, device=sizes.device)
    original = collectives.Communicator._start

    def start(self: Any, what: str, result: Tensor, launch: Callable[[], Any]) -> Any:
        if not result.is_floating_point():
            return original(self, what, result, launch)
        for part in result.view(-1).split(len(noise)):
            part.copy_(noise[: len(part)])
        return collectives.Pending(self, what, result)

    collectives.Communicator._start = start  # type: ignore[method-assign]
    try:
        yield
    finally:
        collectives.Communicator._start = original  # type: ignore[method-assign]


def training(sizes: Sizes, emit: Emit) -> None:
    """Emit tokens per second, MFU and launches of a training step under autocast to bfloat16, and its longest kernels.

    Operations are 6 per parameter and token, and 3.5 times the forward of attention; recomputed ones do not count.
    """
    N = sizes.train_len
    pattern = Pattern.geometric(N, base=min(sizes.base, N), growth=4)
    for label, options in {
        "eager": {},
        "selective checkpointing": {"activation_checkpointing": "selective"},
        "compiled": {},
    }.items():
        config = LongNetConfig(
            d_model=sizes.d_model, num_layers=sizes.layers, num_heads=max(1, sizes.d_model // sizes.head_dim),
            segment_lengths=pattern.segment_lengths, dilation_rates=pattern.dilation_rates, **options,
        )  # fmt: skip
        if label == "compiled" and sizes.device == "cpu":
            emit(setting=label, **{"not run": "a CPU's compiler takes longer than this rehearsal"})
            continue
        try:
            step, forward, backward, model = _training_step(sizes, config, compiled=label == "compiled")
            result = measure({label: step}, sizes.rounds, sizes.device)[label]
        except Exception as error:
            result = {"failed": one_line(error)}
        if "failed" in result:
            emit(setting=label, failed=result["failed"])
            continue
        parameters = sum(p.numel() for p in model.parameters())
        attention = attention_flops(pattern, N, config.num_heads, sizes.d_model // config.num_heads, True)
        flops = 6 * parameters * N + FORWARDS_PER_STEP * attention * sizes.layers
        peak = next((peak for part, peak in PEAKS.items() if part in _device_name(sizes)), None)
        rate = flops / result["ms"] * 1e3
        emit(
            setting=label, parameters=parameters, tokens=N, ms=result["ms"], tokens_per_s=round(N / result["ms"] * 1e3),
            TFLOPs_per_s=round(rate / 1e12, 3), MFU=None if peak is None else round(rate / peak, 3), MiB=result["MiB"],
            host_ms=result["host ms"],
        )  # fmt: skip
        for which, run in {"forward": forward, "backward": backward}.items():
            emit(setting=label, **{"pass": which} | profile(run, sizes.device))
        del step, forward, backward, model


def _device_name(sizes: Sizes) -> str:
    return torch.cuda.get_device_name() if sizes.device == "cuda" else "CPU"


def _training_step(sizes: Sizes, config: LongNetConfig, compiled: bool) -> tuple[Run, Run, Run, nn.Module]:
    """Return a step of AdamW, its forward and its backward, and the model."""
    model = config.build(device=sizes.device)
    if compiled:
        for block in model.blocks:
            block.compile(fullgraph=True)
    optimizer = torch.optim.AdamW(model.parameters(), fused=sizes.device == "cuda")
    tokens = torch.randint(config.vocab_size, (1, sizes.train_len), device=sizes.device)
    targets = next_token_labels(tokens)
    losses: list[Tensor] = []

    def forward() -> None:
        with torch.autocast(sizes.device, torch.bfloat16):
            losses.append(model(tokens, targets=targets))

    def backward() -> None:
        losses.pop().backward()

    def step() -> None:
        forward()
        backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, forward, backward, model


def launches(sizes: Sizes, emit: Emit) -> None:
    """Emit how many kernels one call of dilated attention launches, and the longest of them."""
    for name in sizes.served(emit):
        attend, (q, k, v, dout) = ours(sizes, name, True), sizes.inputs()
        try:
            attention_run(attend, [q, k, v, dout], True)()
            forward = profile(attention_run(attend, [q, k, v, dout], False), sizes.device)
            out = attend(q, k, v)
            backward = profile(partial(torch.autograd.grad, out, (q, k, v), dout), sizes.device)
        except Exception as error:
            emit(kernel=name, failed=one_line(error))
            continue
        emit(kernel=name, **{"pass": "forward"} | forward)
        emit(kernel=name, **{"pass": "backward"} | backward)


PARTS: dict[str, Callable[[Sizes, Emit], None]] = {
    "machine": machine,
    "oracle": oracle,
    "floor": floor,
    "peers": peers,
    "gpus": gpus,
    "ranks": ranks,
    "training": training,
    "launches": launches,
}
