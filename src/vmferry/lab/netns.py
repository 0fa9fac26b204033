"""Sockets in another network namespace, without a process in it.

For the lab and tests. A socket belongs for ever to the namespace of the thread that made it, network_namespaces(7).
"""

from __future__ import annotations

import ctypes
import os
import socket
import threading

from vmferry.lab.layout import NETNS_ROOT
from vmferry.model.errors import NotFound

_CLONE_NEWNET = 0x40000000


def open_socket(namespace: str | None, family: int, kind: int, protocol: int = 0) -> socket.socket:
    """A socket in the named namespace; None is this process's own. Raises NotFound `no-namespace`, OSError."""
    if namespace is None:
        return socket.socket(family, kind, protocol)
    made: list[socket.socket] = []
    faults: list[OSError] = []

    def enter_and_open() -> None:
        try:
            _enter(namespace)
            made.append(socket.socket(family, kind, protocol))
        except OSError as error:
            faults.append(error)

    thread = threading.Thread(target=enter_and_open)
    thread.start()
    thread.join()
    if made:
        return made[0]
    if isinstance(faults[0], FileNotFoundError):
        raise NotFound("no-namespace", f"There is no namespace {namespace}.", "Is the lab up?") from faults[0]
    raise faults[0]


def _enter(namespace: str) -> None:
    """Moves the calling thread, and only it."""
    handle = os.open(NETNS_ROOT / namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(handle, _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), namespace)
    finally:
        os.close(handle)
