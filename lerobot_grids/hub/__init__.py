"""The Hub: prepare, push and pull checkpoints."""
