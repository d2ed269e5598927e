"""Windows that are read ahead, and what becomes of a reading that failed."""

from concurrent.futures import Future

import pytest

from ldm_core.reading.held import Held


def done(result: object = None, error: Exception | None = None) -> Future:
    future: Future = Future()
    if error:
        future.set_exception(error)
    else:
        future.set_result(result)
    return future


def test_what_failed_when_it_was_read_ahead_is_read_again_when_it_is_needed():
    """Hours may lie between, in which the storage has come back."""
    held = Held()
    held.begin("b", lambda: done(error=OSError("away")))
    assert held.get("b", lambda: done("rows")) == "rows"
    assert held.get("b", lambda: pytest.fail("it is held")) == "rows"


def test_a_failure_is_raised_and_tried_again_by_the_next_call():
    held = Held()
    with pytest.raises(OSError, match="away"):
        held.get("b", lambda: done(error=OSError("away")))
    assert held.get("b", lambda: done("rows")) == "rows"


def test_what_is_being_read_is_not_read_twice():
    held, reading = Held(), Future()
    held.begin("b", lambda: reading)
    assert held.begin("b", lambda: pytest.fail("twice")) is reading
    reading.set_result("rows")
    assert held.get("b", lambda: pytest.fail("twice")) == "rows"
