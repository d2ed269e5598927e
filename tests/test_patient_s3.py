"""The S3 file system of everything but the Delta logs, before a server that misbehaves."""

import asyncio
import os
import random
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from botocore.exceptions import (
    ConnectTimeoutError,
    CredentialRetrievalError,
    MetadataRetrievalError,
    NoCredentialsError,
    UnknownSignatureVersionError,
)
from faulty_proxy import FaultyProxy
from proxy_faults import broken_off, fails, lost_answer, named, to

from ldm_core import patient_s3
from ldm_core.files import exists, filesystem, reach, read_bytes, write_bytes
from ldm_core.latents.commit import put_if_absent
from ldm_core.media.locators import member_uri, read_media
from ldm_core.patient_s3 import PatientS3, _patiently

DATA = bytes(range(256)) * 64


@pytest.fixture(scope="module")
def before_the_server(s3: str) -> Iterator[FaultyProxy]:
    with (
        pytest.MonkeyPatch.context() as patch,
        FaultyProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy,
    ):
        patch.setenv("AWS_MAX_ATTEMPTS", "1")  # botocore's own retries aside
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        PatientS3.clear_instance_cache()
        yield proxy
    PatientS3.clear_instance_cache()


@pytest.fixture
def proxy(before_the_server: FaultyProxy) -> FaultyProxy:
    before_the_server.forgive()
    before_the_server.counts.clear()
    return before_the_server


@pytest.fixture
def hasty(monkeypatch) -> None:
    """Pauses between tries are a fiftieth of what they are."""
    lots = SimpleNamespace(uniform=lambda low, high: random.uniform(low, high) / 50)
    monkeypatch.setattr(patient_s3, "random", lots)


@pytest.fixture
def uri(s3: str, proxy: FaultyProxy, hasty: None) -> str:
    write_bytes(f"{s3}/patient/file", DATA)
    return f"{s3}/patient/file"


cut = named("cut", lambda forward: None)


@pytest.mark.parametrize("fault", [cut, fails(500), fails(503)])
@pytest.mark.parametrize("method", ["GET", "PUT", "HEAD"])
def test_what_fails_for_a_while_is_repeated(uri, proxy, method, fault):
    proxy.rule(to(method, "/patient/"), fault, times=2)
    write_bytes(uri, DATA)
    assert exists(uri)
    assert read_media(uri) == DATA
    assert proxy.counts[fault.__name__] == 2


def test_an_answer_that_broke_off_is_asked_for_again(uri, proxy, monkeypatch):
    proxy.rule(to("GET", "/patient/"), broken_off, times=1)
    assert read_media(uri) == DATA
    monkeypatch.setattr(PatientS3, "default_block_size", len(DATA) // 4)
    PatientS3.clear_instance_cache()
    proxy.rule(to("GET", "/patient/"), broken_off, times=1)
    assert read_bytes(uri) == DATA  # a large file: several requests
    proxy.rule(to("GET", "/patient/"), broken_off, times=1)
    assert read_media(member_uri(uri, 256, 512)) == DATA[256:768]
    proxy.rule(to("GET", "/patient/"), broken_off, times=1)
    fs, path = filesystem(uri)
    with fs.open(path) as file:
        assert file.read() == DATA
    assert proxy.counts["broken_off"] == 4


def test_what_will_not_mend_itself_is_told_at_once(s3, uri, proxy):
    before = proxy.counts["requests"]
    with pytest.raises(FileNotFoundError):
        read_bytes(f"{s3}/patient/nothing")
    assert not exists(f"{s3}/patient/nothing")
    with pytest.raises(FileNotFoundError):
        read_bytes("s3://no-such-bucket-of-ours/file")
    assert proxy.counts["requests"] - before < 10


def test_patience_ends_in_an_oserror(uri, proxy, monkeypatch):
    monkeypatch.setattr(patient_s3, "PATIENCE_S", 0.1)
    for fault in (cut, fails(503)):
        proxy.rule(to("GET", "/patient/"), fault)
        with pytest.raises(OSError, match="S3 did not answer for 0 s"):
            read_bytes(uri)
        proxy.forgive()
    assert read_bytes(uri) == DATA


def test_who_waits_is_told_soon(s3, proxy):
    reach(f"{s3}/patient")
    reach("s3://no-such-bucket-of-ours/store")  # it answers, and whoever reads there is told
    reach("/a/folder/that/is/not/there")
    proxy.rule(to(""), cut)
    with pytest.raises(ConnectionError, match="S3 did not answer for 0 s"):
        reach(f"{s3}/patient", patience_s=0.2)
    assert 1 < proxy.counts["cut"] < 5  # tried again, and not for a minute


def test_keys_that_cannot_be_fetched_for_a_while_are_fetched_again(hasty):
    errors = [
        CredentialRetrievalError(provider="iam", error_msg="busy"),
        MetadataRetrievalError(error_msg="busy"),
    ]

    async def action() -> str:
        if errors:
            raise errors.pop()
        return "done"

    assert asyncio.run(_patiently(action, 60)) == "done"


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (NoCredentialsError(), PermissionError),  # for which the command has a word of its own
        (UnknownSignatureVersionError(signature_version="v9"), OSError),
    ],
)
def test_what_botocore_raises_of_its_own_is_an_oserror(raised, seen):
    calls = []

    async def action() -> None:
        calls.append(0)
        raise raised

    with pytest.raises(seen, match="S3: ") as found:
        asyncio.run(_patiently(action, 60))
    assert found.value.__cause__ is raised
    assert len(calls) == 1


def test_patience_in_all_counts_the_first_try():
    calls = []

    async def slow() -> None:
        calls.append(0)
        await asyncio.sleep(0.06)
        raise ConnectTimeoutError(endpoint_url="x")

    with pytest.raises(ConnectionError, match="did not answer"):
        asyncio.run(_patiently(slow, 0.05, in_all=True))
    assert len(calls) == 1


def test_a_conditional_put_without_an_answer_finds_its_own_object(s3, proxy, hasty):
    proxy.rule(to("PUT", "/patient/"), lost_answer, times=1)
    with pytest.raises(FileExistsError):
        put_if_absent(f"{s3}/patient/once", DATA)
    assert read_bytes(f"{s3}/patient/once") == DATA


def test_conditional_puts_in_the_words_of_other_servers(s3, proxy, hasty):
    proxy.rule(to("PUT", "/patient/"), fails(412))  # Ceph does not tell which condition
    with pytest.raises(FileExistsError):
        put_if_absent(f"{s3}/patient/there", DATA)
    proxy.forgive()
    proxy.rule(to("PUT", "/patient/"), fails(409), times=1)  # AWS, of two at the same time
    put_if_absent(f"{s3}/patient/mine", DATA)
    assert proxy.counts["409"] == 1
    assert read_bytes(f"{s3}/patient/mine") == DATA
