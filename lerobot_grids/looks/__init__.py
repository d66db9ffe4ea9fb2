"""Where a policy looks: the points at which it reads its visual tokens, drawn over the frames of an episode."""
