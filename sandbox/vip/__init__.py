"""The Virtual Imaging Platform on loopback."""
