"""vmferryd: registry of VMs, journal, supervision of guests, the host's API."""
