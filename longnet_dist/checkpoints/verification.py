"""Verification of checkpoints: finite values before one is written, sizes and hashes before one is read."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from longnet_dist.checkpoints.storage import MANIFEST, as_os_error

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
        with as_os_error():
            text = (path / MANIFEST).read_bytes()
        manifest = json.loads(text)
        if manifest.pop("sha256") != hash_manifest(manifest):
            return f"{MANIFEST} is not as it was written", True
        files = manifest["files"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing", True
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error!r})", False
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error!r})", True
    unreadable = None
    for name, description in sorted(files.items())[rank::size]:
        try:
            if describe_file(path / name) != description:
                bytes_now = (path / name).stat().st_size
                return f"{name} is not as it was written ({bytes_now} bytes now, {description['bytes']} then)", True
        except FileNotFoundError:
            return f"{name} is missing", True
        except OSError as error:
            unreadable = unreadable or f"{name} cannot be read ({error})"
    return unreadable, False


def hash_manifest(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest without its own `sha256`."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def describe_file(path: Path) -> dict[str, Any]:
    """Return the size in bytes and the SHA-256 of a file."""
    with as_os_error(), path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
