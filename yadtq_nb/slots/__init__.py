"""The slots: child processes that run tasks. They know neither Kafka nor Redis; they alone on a worker unpickle."""
