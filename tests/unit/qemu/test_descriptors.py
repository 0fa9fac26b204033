"""What is borrowed of a process is given back, and nothing of it is changed."""

from __future__ import annotations

import gc
import os
import socket
from types import SimpleNamespace
from typing import cast

from vmferry.qemu.connections import SendQueues
from vmferry.qemu.memory_image import MemoryPlace, MemoryReader
from vmferry.qemu.process import GuestProcess


def test_a_reader_that_nobody_closes_gives_its_files_back() -> None:
    before = set(os.listdir("/proc/self/fd"))
    reader = MemoryReader(MemoryPlace(os.getpid(), 0, 4096, private=True))
    assert len(set(os.listdir("/proc/self/fd")) - before) == 2
    del reader
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) - before == set()


def test_looking_at_a_queue_leaves_the_socket_as_it_is() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        with socket.create_connection(address) as theirs:
            theirs.setblocking(False)
            process = SimpleNamespace(
                find_fds=lambda wanted: [SimpleNamespace(fd=theirs.fileno())], duplicate=lambda fd: os.dup(fd)
            )
            queues = SendQueues(cast(GuestProcess, process), address[1])
            queues.keep_short(1 << 16)
            assert queues.waiting_bytes() == 0
            queues.close()
            assert os.get_blocking(theirs.fileno()) is False
