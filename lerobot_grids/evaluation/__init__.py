"""Closed-loop success in simulation: loading, rollouts, films, and methods beside each other."""
