"""Evaluation of policies: success in simulation, films, paired comparisons, and open-loop validation."""
