"""Simulated robots that run on a CPU: environments, experts that demonstrate in them, rendering."""
