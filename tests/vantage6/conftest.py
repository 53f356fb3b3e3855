"""The shared vantage6 sandboxes."""

from harness.federation import federations, here

__all__ = ["federations", "here"]
