"""What a feeder takes of what its reader brings."""

from __future__ import annotations

from yadtq_nb.backlog.reader import Record
from yadtq_nb.worker.feeder import Feeder


def test_record_that_is_missing_is_read_again_before_the_cursor_passes_it() -> None:
    feeder = Feeder.__new__(Feeder)
    feeder._positions, feeder._gaps, feeder._assigned = {0: 5, 1: 0}, set(), True

    def taken(*places: tuple[int, int]) -> list[tuple[int, int]]:
        records = [Record(partition, offset, b"") for partition, offset in places]
        return [(record.partition, record.offset) for record in feeder._in_order(records)]

    assert taken((0, 5), (1, 0), (0, 6), (2, 0)) == [(0, 5), (1, 0), (0, 6)], "of its own partitions"
    assert taken((0, 4), (0, 5)) == [(0, 5)], "no record twice"
    assert feeder._assigned
    assert taken((0, 6), (1, 0), (0, 7)) == [(1, 0)], "the others go on"
    assert not feeder._assigned
    assert taken((0, 6), (0, 7)) == [(0, 6), (0, 7)], "there is none, the second time, too"
