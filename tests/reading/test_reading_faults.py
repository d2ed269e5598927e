"""The reader before a store that is away for a while, for good, or damaged."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bucket_store import SQUARE, WIDE, bucket_store
from faulty_proxy import FaultyProxy
from proxy_faults import broken_off, fails, to

from ldm_core import patient_s3
from ldm_core.errors import UserError
from ldm_core.latents.store import StoreVersion
from ldm_core.patient_s3 import PatientS3
from ldm_core.reading.index import index_store
from ldm_core.reading.row_groups import PATIENCE_S
from ldm_core.reading.stream import StreamReader
from ldm_core.training.checkpoint_patience import ATTEMPTS, FIRST_PAUSE_S, LONGEST_PAUSE_S
from ldm_core.training.prefetch import prefetch

COUNTS = {SQUARE: 40, WIDE: 16}


@pytest.fixture
def proxy(s3: str, monkeypatch) -> Iterator[FaultyProxy]:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        PatientS3.clear_instance_cache()
        yield proxy
    PatientS3.clear_instance_cache()


def reader_of(version: StoreVersion, **options) -> StreamReader:
    settings = {"seed": 0, "lanes": 2, "budget": 64, "tokens": lambda _: 16}
    return StreamReader([index_store(version)], **(settings | options))


@pytest.mark.parametrize("fault", [fails(503), broken_off])
def test_a_store_that_is_away_costs_time_alone(s3, proxy, tmp_path, fault):
    local = reader_of(bucket_store(tmp_path, COUNTS))
    remote = reader_of(bucket_store(f"{s3}/away/{fault.__name__}", COUNTS))
    for table in ("samples", "texts"):
        proxy.rule(to("GET", f"/{table}/"), fault, times=2)
    for step, batches in prefetch(remote.batches, 0, 7, ahead=2, threads=2):
        for one, other in zip(batches, local.batches(step), strict=True):
            assert torch.equal(one.latents, other.latents)
            assert one.captions == other.captions
    assert proxy.counts[fault.__name__] == 4


def test_a_reader_outlasts_what_other_requests_do_not(s3, proxy, monkeypatch, caplog):
    """A store that is gone for longer than a request's own patience, and what is said of it."""
    version = bucket_store(f"{s3}/long-gone", COUNTS)
    monkeypatch.setattr(patient_s3, "PATIENCE_S", 0.05)
    with reader_of(version, patience_s=60.0) as reader, caplog.at_level("WARNING", "ldm_core"):
        proxy.rule(to("GET", "/samples/"), proxy.gone(1.5), times=1)
        assert [len(batch) for batch in reader.batches(0)] == [4, 4]
    assert proxy.counts["gone"] == 1
    assert "S3 does not answer" in caplog.text
    assert "trying on for 60 s" in caplog.text


def test_a_training_is_as_patient_as_its_checkpoints():
    """Each of a checkpoint's attempts has a request's patience, and there are pauses between."""
    pauses = sum(min(FIRST_PAUSE_S * 2**k, LONGEST_PAUSE_S) for k in range(ATTEMPTS - 1))
    assert pytest.approx(PATIENCE_S, rel=0.05) == ATTEMPTS * patient_s3.PATIENCE_S + pauses


def test_what_is_away_for_good_is_an_error_and_no_more_once_it_is_back(s3, proxy):
    reader = reader_of(bucket_store(f"{s3}/gone", COUNTS), patience_s=0.1)
    proxy.rule(to("GET", "/samples/"), fails(503))
    with pytest.raises(OSError, match="S3 did not answer"):
        reader.batches(0)
    proxy.forgive()
    assert [len(batch) for batch in reader.batches(0)] == [4, 4]


def test_a_file_that_vanished_is_named_at_its_step(tmp_path):
    version = bucket_store(tmp_path, {SQUARE: 40})
    index = index_store(version)
    reader = StreamReader([index], seed=0, lanes=1, budget=64, tokens=lambda _: 16, window_bytes=1)
    unit = reader.order.parts((0, SQUARE, 0, 3))[0].unit
    path = index.samples.groups.place(int(index.samples.group[unit])).path
    Path(index.samples.groups.uri, path).unlink()
    done = []
    with pytest.raises(FileNotFoundError, match=path):
        done.extend(step for step, _ in prefetch(reader.batches, 0, 10, ahead=3))
    assert done == [0, 1, 2, 3, 4, 5]  # two steps of each window of eight


def test_a_latent_of_another_size_is_refused_with_its_remedy(tmp_path):
    shapes = {SQUARE: (2, 4, 4)}
    version = bucket_store(tmp_path, {SQUARE: 8}, shapes=shapes)
    reader = reader_of(version)
    reader.shapes[SQUARE] = (2, 4, 5)
    with pytest.raises(UserError, match="ldm store verify"):
        reader.batches(0)
