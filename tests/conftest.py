"""Fixtures shared by all tests; its presence puts tests/ on the import path."""

import logging
from collections.abc import Iterator

import pytest

BUCKET = "s3://latent-diffusion"


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """URI of an empty bucket on an S3 server of our own, with AWS_* set to reach it."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        }.items():
            patch.setenv(key, value)
        import s3fs

        s3fs.S3FileSystem().mkdir(BUCKET)
        yield BUCKET
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
