"""Credentials blocks, one for each platform."""
