"""One HTML page about a checkpoint: how it was trained, where it looks, what it costs, how often it succeeds."""
