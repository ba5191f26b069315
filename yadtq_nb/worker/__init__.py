"""The worker: a node and its slots. Shares with the client only backlog, workbench, codec and model."""
