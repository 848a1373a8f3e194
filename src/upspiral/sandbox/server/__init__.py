"""Sandboxes for other processes and machines: a server of leases, by HTTP and WebSocket."""
