"""The laboratory of the ingest tests."""

from harness.ingest_lab import lab, make_lab

__all__ = ["lab", "make_lab"]
