"""Fixtures that every layer of tests uses."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest
import torch

from tests.pool import Pool

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
# Ray reads them when it is imported. A token of the tests' own: none is left in anybody's home.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
# Its workers shall see no variable of a GPU that they were not given, which it else says in a warning.
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"


@pytest.fixture(autouse=True)
def _seeded(doctest_namespace: dict[str, object]) -> None:
    import longnet_dist

    torch.manual_seed(0)
    doctest_namespace.update(vars(longnet_dist), torch=torch)


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    made = Pool()
    yield made
    made.close()
