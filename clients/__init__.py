"""What goes over the wire: errors, HTTP, polling, transfers, and one client for each platform."""
