"""What a node writes down: all that is new, and what comes again and again now and then."""

from __future__ import annotations

import logging

import pytest

from yadtq_nb.worker import logs


def test_line_that_comes_again_and_again_is_written_now_and_then_with_how_often_it_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(logs.time, "monotonic", lambda: now)
    seldom = logs._Seldom()

    def written(message: str, *args: object, error: Exception | None = None) -> str | None:
        info = None if error is None else (type(error), error, None)
        record = logging.LogRecord("yadtq_nb.kafka", logging.WARNING, "", 0, message, args, info)
        return record.getMessage() if seldom.filter(record) else None

    assert written("connection %d refused", 1) == "connection 1 refused"
    assert written("connection %d refused", 2) is None
    assert written("another") == "another"
    assert written("failed", error=ValueError("a")) == "failed"
    assert written("failed", error=ValueError("b")) == "failed"
    assert written("failed", error=ValueError("b")) is None
    now = 9.0
    assert written("connection %d refused", 3) is None
    now = 11.0
    assert written("connection %d refused", 4) == "connection 4 refused (and 2 times since this was last written)"
    now = 22.0
    assert written("connection %d refused", 5) == "connection 5 refused"
    for number in range(1000):
        written("x" * number)
    assert len(seldom._seen) <= 200
