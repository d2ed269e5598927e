"""Fixtures shared by all tests; its presence puts tests/ on the import path."""

import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for all processes of a test run; see `made_once`."""
    mine = tmp_path_factory.getbasetemp()
    return mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """URI of an empty bucket on an S3 server of our own, with AWS_* set to reach it.

    The server is moto's, or the real one that `make test-s3` names in LDM_TEST_S3.
    """
    with _s3_server() as endpoint, pytest.MonkeyPatch.context() as patch:
        for key, value in {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        }.items():
            patch.setenv(key, value)
        if not os.environ.get("LDM_TEST_S3"):
            patch.setenv("AWS_ACCESS_KEY_ID", "key")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        import s3fs

        bucket = f"s3://latent-diffusion-{uuid.uuid4().hex[:8]}"  # a real server may be shared
        s3fs.S3FileSystem().mkdir(bucket)
        yield bucket


@contextmanager
def _s3_server() -> Iterator[str]:
    """The endpoint of a server that lasts as long as the tests."""
    if real := os.environ.get("LDM_TEST_S3"):
        yield real
        return
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def ray_session(s3: str) -> Iterator[None]:
    """One local Ray of two CPUs for all tests; after `s3`, whose AWS_* its workers inherit."""
    import ray

    from pipelines import ray_runtime

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)  # not one that happens to be this shell's
        ray_runtime.start(cpus=2)
    yield
    ray.shutdown()
