"""Policies with their processors: loaded to act, or built to be trained."""

from .loaded import LoadedPolicy, flow_steps, set_flow_steps, token_counts
from .loading import load, load_processors, peek
from .sources import checked_device, find_source, find_weights, parse_tokens, short_name, source_type
from .starting import start

__all__ = [
    "LoadedPolicy",
    "checked_device",
    "find_source",
    "find_weights",
    "flow_steps",
    "load",
    "load_processors",
    "parse_tokens",
    "peek",
    "set_flow_steps",
    "short_name",
    "source_type",
    "start",
    "token_counts",
]
