"""What the Hub shows of a pushed policy."""
