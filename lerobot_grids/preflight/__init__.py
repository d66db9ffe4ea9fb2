"""Does a dataset fit a policy and its options? Answered in lines, before anything heavy starts or is written."""

from .findings import Finding, refuse_errors

__all__ = ["Finding", "refuse_errors"]
