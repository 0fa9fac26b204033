"""Measures from outside what a guest's clients see. Run in the client's namespace as processes of their own.

`python -m vmferry.lab.probes udp|tcp|stream|frames ...` prints one JSON document at its end or on SIGTERM/SIGINT;
`launch.start_probe` starts one and reads it. Imports only the standard library: a probe must start quickly.
"""
