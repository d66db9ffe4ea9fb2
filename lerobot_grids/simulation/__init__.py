"""Simulated robots that run on a CPU: environments, demonstrations of scripted experts, rendering."""
