"""`./dev bench`: vmferry, virsh and a bare QMP script side by side, on the same link and the same guest.

A program of its own that measures from outside: it drives vmferry through its command line, and imports of it only the
lab, the model's errors and nothing else. Nothing imports it.
"""
