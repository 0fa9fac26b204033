"""Hosts in network namespaces on one machine, small guests, probes, faults."""
