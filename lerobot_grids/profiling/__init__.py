"""Costs of a policy by stage: FLOPs, milliseconds, memory."""
