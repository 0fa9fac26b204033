"""Pools and what is in them: layers, copying, digests."""
