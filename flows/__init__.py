"""Flows that read like the protocol of each platform."""
