"""The host's switches and ports, the gate, announcements, tunnels."""
