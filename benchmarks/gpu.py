"""Measure a GPU in minutes: exactness, floors, peers, one rank of many, a training step, and what is launched.

    python benchmarks/gpu.py --out DIR [--parts floor peers] [--kernels torch] [--limit floor=60]
    python benchmarks/gpu.py --out DIR --device cpu --small      a rehearsal of every part, in well under a minute

It needs torch and this checkout. Each part runs in a process of its own, for no longer than its time limit. A result is
appended to DIR/results.jsonl as soon as it is measured, and DIR/results.md is written again after each part. So an
interrupted run leaves all that it had measured. Running the command again appends to the same files.

The parts:

- machine: versions, and which kernels serve the GPU;
- oracle: the error against the float64 oracle, over the error of the same kernel on dense attention;
- floor: dilated attention with each kernel, over the same kernel on blocks that are contiguous already;
- peers: dense attention, and a baseline in the way of torchscale, on the same inputs;
- gpus: one rank per GPU, next to ring-flash-attn and torch's context parallel, if there are several GPUs;
- ranks: one rank of up to 65,536, on a fake process group: local rows are real, rows of other ranks are synthetic;
- training: tokens per second and MFU of a LongNet, with a profile of forward and backward;
- launches: how many kernels one call of dilated attention launches, forward and backward.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

LIMITS = {
    "machine": 60,
    "oracle": 90,
    "floor": 180,
    "peers": 120,
    "gpus": 120,
    "ranks": 150,
    "training": 200,
    "launches": 90,
}
"""The parts in their order, and the seconds that each may take. On an idle H100 all take a fraction of that."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; created if it is missing")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small sizes, for a rehearsal")
    parser.add_argument("--rounds", type=int, default=5, help="measured runs of each contestant")
    parser.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--kernels", nargs="+", help="names of kernels; by default all that the device has")
    parser.add_argument("--gpus", type=int, help="ranks of the part `gpus`; by default one per GPU")
    parser.add_argument("--limit", nargs="+", default=[], metavar="PART=SECONDS", help="other time limits")
    options = parser.parse_args(arguments)
    options.limits = dict(LIMITS)
    for entry in options.limit:
        part, _, seconds = entry.partition("=")
        try:
            options.limits[part] = {part: float(seconds) for part in [part] if part in LIMITS}[part]
        except (KeyError, ValueError):
            parser.error(f"--limit {entry}: give PART=SECONDS, with a part of {', '.join(LIMITS)}")
    return options


def main(options: argparse.Namespace) -> int:
    options.out.mkdir(parents=True, exist_ok=True)
    # A process that has used CUDA cannot be forked. On a CPU, parts are forked from one that has imported torch.
    context = multiprocessing.get_context("forkserver" if options.device == "cpu" else "spawn")
    if options.device == "cpu":
        # The first call of an operator imports the compiler, which takes longer than all small parts together.
        context.set_forkserver_preload(["torch._dynamo", "longnet_dist.attention.api", "longnet_dist.models.decoder"])
    failed = 0
    for name in options.parts:
        began = time.perf_counter()
        process = context.Process(target=run_part, args=(name, options), daemon=True)
        process.start()
        try:
            outcome = wait(process, options.limits[name])
        except KeyboardInterrupt:
            end(process)
            write_tables(options.out)
            raise
        failed += outcome != "done"
        write(options.out, {"part": name, "outcome": outcome, "seconds": round(time.perf_counter() - began, 1)})
        write_tables(options.out)
        print(f"{name}: {outcome} after {time.perf_counter() - began:.1f} s", flush=True)
    print(f"results: {options.out / 'results.md'}")
    return 1 if failed else 0


def wait(process: Any, limit: float) -> str:
    """Wait for a part, end it at its time limit, and return what became of it."""
    process.join(limit)
    if process.exitcode is None:
        end(process)
        return f"ended at its limit of {limit:g} s"
    return "done" if process.exitcode == 0 else f"failed with exit status {process.exitcode}"


def end(process: Any) -> None:
    """Kill a part and its children, such as compilers."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()  # It has not become the leader of its group yet.
    process.join()


def run_part(name: str, options: argparse.Namespace) -> None:
    """Run one part in this process; its rows are written at once."""
    os.setsid()
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    import gpu_parts

    def emit(**row: Any) -> None:
        write(options.out, {"part": name} | row)
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)

    try:
        gpu_parts.PARTS[name](gpu_parts.Sizes.of(options), emit)
    except Exception as error:
        traceback.print_exc()
        emit(failed=one_line(error))
        sys.exit(1)


def one_line(error: BaseException) -> str:
    """Return an error's type, and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]


def write(folder: Path, row: dict[str, Any]) -> None:
    """Append a row to the results, and to the disk."""
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_tables(folder: Path) -> None:
    """Write results.md: a table for each part, and what became of it."""
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    text = ["# Measurements of a GPU", "", f"`python benchmarks/gpu.py {' '.join(sys.argv[1:])}`", ""]
    for part in LIMITS:
        own = [{key: value for key, value in row.items() if key != "part"} for row in rows if row["part"] == part]
        if not own:
            continue
        text += [f"## {part}", ""]
        measured = [row for row in own if not {"outcome", "failed", "not run"} & row.keys()]
        for columns in dict.fromkeys(tuple(row) for row in measured):
            text += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
            text += [f"| {' | '.join(map(cell, row.values()))} |" for row in measured if tuple(row) == columns] + [""]
        for row in own:
            if row not in measured:
                text.append("- " + ", ".join(f"{key}: {value}" for key, value in row.items()))
        text.append("")
    (folder / "results.md").write_text("\n".join(text))


def cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value).replace("|", "/")


if __name__ == "__main__":
    sys.exit(main(parse()))
