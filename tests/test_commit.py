"""What is committed to Kafka: what lies before it is finished, so that lag is an upper bound of the work left."""

from __future__ import annotations

from pathlib import Path

from offsets import committed
from waiting import wait_for_file, wait_until

from yadtq_nb import LocalCluster, Queue
from yadtq_nb.backlog.connection import Topic, Topics


def test_commit_waits_for_the_oldest_unfinished_chunk_and_then_reaches_the_end(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    gate = str(tmp_path / "gate")

    with cluster.queue() as queue:
        blocked = queue.submit(wait_for_file, gate)
        queue.map(abs, range(40), chunksize=1).results(60)
        topic = Topics(cluster.config, queue.name).ensure()
        ends = {partition: cursor.offset for partition, cursor in queue._link().store.fed()[1].items()}
        wait_until(lambda: len(_lagging(cluster, queue, topic, ends)) == 1)
        (partition,) = _lagging(cluster, queue, topic, ends)
        oldest = _oldest_unfinished(queue, topic, partition)
        assert (committed(cluster, queue, topic)[partition] or 0) <= oldest
        Path(gate).touch()
        blocked.result(60)
        wait_until(lambda: not _lagging(cluster, queue, topic, ends))


def _lagging(cluster: LocalCluster, queue: Queue, topic: Topic, ends: dict[int, int]) -> list[int]:
    found = committed(cluster, queue, topic)
    return [partition for partition, end in ends.items() if end and found[partition] != end]


def _oldest_unfinished(queue: Queue, topic: Topic, partition: int) -> int:
    redis = queue._link().store._redis
    with redis.use() as client:
        (oldest,) = client.zrange(redis.key("position", topic.id, str(partition)), 0, 0)
    return int(oldest)
