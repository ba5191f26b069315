"""The backlog: what waits, in Kafka, and the record of what happened. The only room that imports confluent_kafka."""
