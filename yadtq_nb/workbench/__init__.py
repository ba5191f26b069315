"""The workbench: chunks in hand and results, in Redis. The only room that imports redis."""
