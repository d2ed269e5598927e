"""What becomes of reads when nobody wants them any more."""

import threading

import pytest

from ldm_core.reading import loading
from ldm_core.reading.loading import Loader


@pytest.fixture
def away():
    """A storage that does not answer for as long as the test lasts."""
    answered = threading.Event()
    yield answered
    answered.set()


def test_the_end_does_not_wait_for_a_storage_that_is_away(away, monkeypatch):
    monkeypatch.setattr(loading, "CLOSE_S", 0.1)
    loader = Loader([], seed=0, text_bytes=0, threads=1, patience_s=400)
    began = threading.Event()

    def load():
        began.set()
        away.wait()

    reading, waiting = loader.submit(load), loader.submit(load)
    assert began.wait(10)
    loader.close()  # or the test's time would be over
    assert not away.is_set()
    assert not reading.done()
    assert waiting.cancelled()
    away.set()
    assert reading.result(10) is None
