"""The slots: child processes that run tasks. They know neither Kafka nor Redis; only they unpickle what a job sends."""
