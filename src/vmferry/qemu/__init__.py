"""One guest process: command line, QMP session, features, block graph, memory image."""
