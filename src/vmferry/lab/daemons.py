"""A lab host's vmferryd: its configuration and certificates, starting it in its namespace, waiting until it answers.

For `lab.namespaces` and for tests that kill and restart daemons.
"""

from __future__ import annotations

import http.client
import os
import pwd
import socket
import sys
import time
from pathlib import Path

from vmferry.api import pki
from vmferry.lab.layout import LAN_BRIDGE, MIGRATION_PORT, STATE_ROOT, HostLayout, LabLayout
from vmferry.lab.processes import Process, is_running, observe_process, reap
from vmferry.model.errors import Failed

GUEST_USER = "vmferry"
_START_LIMIT_S = 30.0


def guest_user() -> str:
    """The user for guests: `vmferry` if set-up has made it, else "" (the daemon's own)."""
    try:
        return pwd.getpwnam(GUEST_USER).pw_name
    except KeyError:
        return ""


def write_host_config(host: HostLayout) -> Path:
    """Makes the host's directories and its vmferryd.toml (schema: vmferry.host.config)."""
    for directory in (host.state_dir, host.run_dir, *host.pools.values()):
        directory.mkdir(parents=True, exist_ok=True)
    for passage in (STATE_ROOT, host.lab.state_root, host.directory, host.directory / "pools", *host.pools.values()):
        passage.chmod(0o755)  # guests do not run as root; whatever the umask is, they must get to their images
    lines = [
        "[host]",
        f'name = "{host.name}"',
        f'state_dir = "{host.state_dir}"',
        f'run_dir = "{host.run_dir}"',
        f'guest_user = "{guest_user()}"',
        f'accel = "{host.lab.accel}"',
    ]
    for name, path in host.pools.items():
        lines += ["[[pool]]", f'name = "{name}"', 'kind = "directory"', f'path = "{path}"']
    lines += ["[[switch]]", 'name = "lan"', 'kind = "bridge"', f'device = "{LAN_BRIDGE}"', 'uplinks = ["lan0"]']
    lines += ["[migration]", f'address = "{host.migration_address}"', f"port = {MIGRATION_PORT}"]
    lines += ["[limits]", 'memory_reserve = "0"', "incoming = 4", "outgoing = 4"]
    lines.append("[peers]")
    lines += [f'{peer.name} = "{peer.migration_address}:{MIGRATION_PORT}"' for peer in host.lab.hosts if peer != host]
    host.config.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return host.config


def write_identities(layout: LabLayout) -> None:
    """A CA on host1 and a certificate for every host, as `vmferry host init` and `join` make them."""
    first = layout.hosts[0]
    ca_dir = first.state_dir / "tls"
    gid = pwd.getpwnam(GUEST_USER).pw_gid if guest_user() else None
    pki.create_ca(ca_dir, f"lab {layout.prefix}")
    for host in layout.hosts:
        own_dir = host.state_dir / "tls"
        requests = pki.make_csr(own_dir, host.name)
        pki.install_certificates(own_dir, pki.sign_csr(ca_dir, requests, [host.migration_address]), gid)


def write_client_config(layout: LabLayout) -> None:
    """Tells the CLI where the daemons' sockets are."""
    tables = [f'[[host]]\nname = "{host.name}"\nsocket = "{host.socket}"\n' for host in layout.hosts]
    layout.client_config.write_text("\n".join(tables), encoding="utf-8")


def start_daemon(host: HostLayout) -> Process:
    """Starts the real vmferryd in the host's namespace and in a session of its own; does not wait until it answers."""
    # `ip netns exec` also mounts a /sys that shows this namespace's devices. All of these keep the PID.
    argv = ["ip", "netns", "exec", host.namespace, "env", "--chdir=/"]
    argv += [sys.executable, "-m", "vmferry.host.main", "--config", str(host.config)]
    log = (os.POSIX_SPAWN_OPEN, 1, str(host.log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    files = [(os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0), log, (os.POSIX_SPAWN_DUP2, 1, 2)]
    pid = os.posix_spawnp(argv[0], argv, os.environ, file_actions=files, setsid=True)
    process = observe_process(pid)
    if process is None:
        raise _not_up(host, "it ended at once")
    return process


def wait_until_answering(host: HostLayout, process: Process) -> None:
    """Returns when GET /v1/host answers. Raises Failed `lab-daemon-failed` with the end of the log."""
    deadline = time.monotonic() + _START_LIMIT_S
    while not _answers(host.socket):
        if not is_running(process):
            reap(process)
            raise _not_up(host, "it ended")
        if time.monotonic() > deadline:
            raise _not_up(host, f"it did not answer within {_START_LIMIT_S:.0f} s")
        time.sleep(0.02)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=5)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(5)
        self.sock.connect(str(self._path))


def _answers(path: Path) -> bool:
    connection = _UnixConnection(path)
    try:
        connection.request("GET", "/v1/host")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _not_up(host: HostLayout, why: str) -> Failed:
    try:
        words = host.log.read_text(errors="replace").strip().splitlines()[-1:]
    except OSError:
        words = []
    told = f" Its last words: {words[0][:300]}" if words else ""
    return Failed(
        "lab-daemon-failed",
        f"vmferryd of {host.name} is not up: {why}.{told}",
        f"Read {host.log}, or after a failed lab up {host.lab.kept_logs}.",
    )
