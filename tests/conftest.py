"""Fixtures for all tests."""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Iterator

import pytest
import torch

from tests.pool import Pool

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
# Ray reads these when it is imported. With a token of the tests' own, none is left in the user's home.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
# Without this, Ray warns that it will change the GPU variables of workers that have no GPU.
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests that need the Ray cluster last, so that its daemons run next to no other test."""
    items.sort(key=lambda item: "ray_nodes" in getattr(item, "fixturenames", ()))


@pytest.fixture(autouse=True)
def _seeded(doctest_namespace: dict[str, object]) -> None:
    import longnet_dist

    torch.manual_seed(0)
    names = {name: getattr(longnet_dist, name) for name in longnet_dist.__all__}
    doctest_namespace.update(names, torch=torch)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """A pool of processes that ends with the module, because the thread of each gloo group wakes 100 times a second."""
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[None]:
    """A server of S3's protocol on the loopback; environment variables name it to this process and its children."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The server's own warnings.
        from moto.server import ThreadedMotoServer

        server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
    os.environ["AWS_ENDPOINT_URL"] = "http://{}:{}".format(*server.get_host_and_port())
    os.environ |= {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": "us-east-1"}
    yield
    server.stop()


@pytest.fixture
def bucket(s3_server: None) -> str:
    """An empty bucket, s3://NAME."""
    import s3fs

    name = f"bucket-{secrets.token_hex(8)}"
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}"
