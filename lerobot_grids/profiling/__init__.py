"""What a policy costs, stage by stage: FLOPs, milliseconds, memory."""
