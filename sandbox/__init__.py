"""The three platforms on loopback."""
