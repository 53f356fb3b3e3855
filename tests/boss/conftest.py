"""The laboratory of the ingest tests."""

from ingest_lab import lab, make_lab

__all__ = ["lab", "make_lab"]
