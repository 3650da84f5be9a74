"""The connection to a Ray cluster: the one at RAY_ADDRESS, or one that is started on this machine."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import tempfile
import warnings
from pathlib import Path

import ray
from ray.exceptions import RayError

from longnet_dist import internals

_ANSWER_SECONDS = 5.0
_FORMS = "HOST:PORT, ray://HOST:PORT, auto or local"


def has_no_cluster() -> bool:
    """Return whether RAY_ADDRESS names no cluster, so that `connect` starts one on this machine."""
    return os.environ.get("RAY_ADDRESS", "") in ("", "local")


def connect(dashboard: bool = False) -> None:
    """Connect to the cluster at RAY_ADDRESS, or start one on this machine, which Ray protects with a token.

    Args:
        dashboard: whether a cluster that is started here has Ray's dashboard.

    Raises:
        ValueError: if RAY_ADDRESS is malformed, or no cluster answers there within seconds.
    """
    if ray.is_initialized():
        return
    if has_no_cluster():
        prepare_token()
        ray.init(address="local", include_dashboard=dashboard)
        return
    address = os.environ["RAY_ADDRESS"]
    advice = "Give the address of a cluster that runs, or unset RAY_ADDRESS to start Ray on this machine"
    try:
        _check_answer(*_host_and_port(address))
        advice = "Something answers there: check that it is Ray, of this version, and that its token is yours"
        ray.init()
    except (OSError, RuntimeError, ValueError, RayError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
        raise ValueError(f"RAY_ADDRESS is {address!r}: {reason}. {advice}") from error


def prepare_token() -> None:
    """Create the token that Ray is about to create, but readable by its owner alone.

    Ray protects a cluster on this machine with the token in `~/.ray/auth_token`, which it creates with the mode that
    the umask leaves: 0644 as a rule. Nothing is done where Ray takes another token, or none. A token that exists and
    that others can read leads to a warning.
    """
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    path = Path.home() / ".ray" / "auth_token"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        # The link appears with its content, and fails if another process has created a token in the meantime.
        with tempfile.NamedTemporaryFile("w", dir=path.parent) as file, contextlib.suppress(FileExistsError):
            file.write(secrets.token_hex(32))
            file.flush()
            os.link(file.name, path)
    if path.stat().st_mode & 0o077:
        warnings.warn(
            f"other users of this machine can access {path}, and the token in it lets them run code on your Ray "
            f"clusters: chmod 600 {path}",
            stacklevel=3,
        )


def _host_and_port(address: str) -> tuple[str, int]:
    """Return the host and port to which Ray connects for an address."""
    scheme, separator, rest = address.rpartition("://")
    if separator and scheme != "ray":
        raise ValueError(f"it must be {_FORMS}")
    if address != "auto":
        host, port = _parse(rest)
    # Without a scheme, Ray looks for `auto`, and replaces the loopback interface by the node's address.
    return (host, port) if separator else _parse(internals.ray_address(address))


def _parse(address: str) -> tuple[str, int]:
    match = re.fullmatch(r"(\[[^\[\]]+\]|[^:]+):(.*)", address)
    if match is None:
        raise ValueError(f"it must be {_FORMS}")
    host, port = match.groups()
    if not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise ValueError(f"the port is {port!r}; it must be between 1 and 65535")
    return host, int(port)


def _check_answer(host: str, port: int) -> None:
    """Raise ValueError unless Ray answers. Ray itself tries for minutes."""
    try:
        socket.create_connection((host.strip("[]"), port), _ANSWER_SECONDS).close()
    except OSError as error:
        raise ValueError(f"nothing answers at {host}:{port} ({error.strerror or error})") from None
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return  # Ray's own certificates are needed to ask more.
    import grpc  # Here: ranks of a gang start without it.

    with grpc.insecure_channel(f"{host}:{port}", [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(_ANSWER_SECONDS)
        except grpc.FutureTimeoutError:
            raise ValueError(f"no Ray answers at {host}:{port} within {_ANSWER_SECONDS:g} s") from None
