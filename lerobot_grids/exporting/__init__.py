"""Policies for other runtimes: their two phases as graphs, and their processors as constants."""

from .exporter import Exported, ExportedPolicy, export, print_export

__all__ = ["Exported", "ExportedPolicy", "export", "print_export"]
