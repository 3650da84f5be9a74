"""Verification of checkpoints: finite values before one is written, sizes and hashes before one is read."""

from __future__ import annotations

import hashlib
import json
import math
import stat
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from longnet_dist.checkpoints.storage import MANIFEST, as_os_error, in_store

State = dict[str, Tensor]
"""The content of a checkpoint: tensors by name."""


def find_non_finite(state: State) -> str | None:
    """Describe the first tensor of this rank that holds NaN or infinity; None if there is none."""
    local = {name: x.to_local() if isinstance(x, DTensor) else x for name, x in state.items()}
    local = {name: x for name, x in local.items() if x.is_floating_point() and x.numel()}
    # The largest magnitude of all values is NaN or infinity if any is. That is one pass, without a copy of the state.
    if math.isfinite(get_total_norm(local.values(), math.inf).item()):
        return None
    return f"{next(name for name, x in local.items() if not x.isfinite().all())} holds NaN or infinity"


def find_damage(path: Path, rank: int, size: int) -> tuple[str | None, bool]:
    """Compare a share of a checkpoint's files with its manifest.

    Args:
        path: the checkpoint.
        rank: the number of the share, from 0.
        size: the number of shares.

    Returns:
        The problem, or None, and whether it proves damage. An error while reading does not, because the file may be
        readable later.
    """
    try:
        manifest = _read_manifest(path)
    except FileNotFoundError:
        return f"{MANIFEST} is missing", True
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error!r})", False
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({error!r})", True
    if manifest["sha256"] != hash_manifest(manifest):
        return f"{MANIFEST} is not as it was written", True
    if names := [name for name in manifest["files"] if not is_plain_name(name)]:
        return f"{MANIFEST} lists {names[0]!r}, and only files of the checkpoint's own folder are read", True
    unreadable = None
    for name, description in sorted(manifest["files"].items())[rank::size]:
        try:
            problem = _compare(path / name, description)
        except FileNotFoundError:
            return f"{name} is missing", True
        except OSError as error:
            unreadable = unreadable or f"{name} cannot be read ({error})"
        else:
            if problem:
                return f"{name} is not as it was written{problem}", True
    return unreadable, False


def is_plain_name(name: str) -> bool:
    """Return whether a name is that of a file in the folder at hand, and leads nowhere else."""
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def check_regular(path: Path) -> None:
    """Check that a path is a regular file. A pipe or device might never end, and a link leads elsewhere.

    Raises:
        OSError: if it is anything else, or missing.
    """
    if not in_store(path) and not stat.S_ISREG(path.lstat().st_mode):
        raise OSError("it is no regular file, and symbolic links are not followed: put a copy in its place")


def _read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest, and check that its entries have the right types."""
    with as_os_error():
        check_regular(path / MANIFEST)
        text = (path / MANIFEST).read_bytes()
    manifest = json.loads(text)
    facts, files = manifest["facts"], manifest["files"]
    if not isinstance(facts, dict) or not isinstance(manifest["sha256"], str):
        raise TypeError("its facts must be an object, and its sha256 text")
    for description in files.values():
        if type(description["bytes"]) is not int or not isinstance(description["sha256"], str):
            raise TypeError("each file must have a number of bytes and a sha256")
    return manifest


def _compare(path: Path, description: dict[str, Any]) -> str | None:
    """Return how a file differs from its description, or None. The size comes first, because it costs nothing."""
    with as_os_error():
        check_regular(path)
        num_bytes = path.stat().st_size
    if num_bytes == description["bytes"] and describe_file(path) == description:
        return None
    return f" ({num_bytes} bytes now, {description['bytes']} then)"


def hash_manifest(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest without its own `sha256`."""
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def describe_file(path: Path) -> dict[str, Any]:
    """Return the size in bytes and the SHA-256 of a file."""
    with as_os_error(), path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
