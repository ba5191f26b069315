"""The slots: child processes that run tasks. They know neither Kafka nor Redis; what a node never unpickles, they do."""
