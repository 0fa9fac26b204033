"""A libvirtd for each host of the stage, with directories, /dev and a host name of its own.

libvirt knows only fixed paths, so it gets private ones in a mount namespace, below /etc, /run and /var. Its /dev has no
kvm: where that exists and does not work, libvirt would still offer it.
"""

from __future__ import annotations

import subprocess
import time
import uuid
from pathlib import Path

from vmferry.lab.layout import HostLayout
from vmferry.lab.namespaces import exec_prefix
from vmferry.model.errors import Failed

_PRIVATE = ("etc", "var/lib", "var/cache", "var/log")
_START_S = 30.0
_END_S = 10.0
# $1: the private root, $2: host name. `exec` keeps the PID: the process we started is libvirtd.
_ENTER = """
set -e
mount --make-rprivate /
mkdir -p "$1/dev"
mount -t tmpfs -o mode=755 dev "$1/dev"
mkdir "$1/dev/pts" "$1/dev/shm" "$1/dev/net"
for node in null:1:3 zero:1:5 full:1:7 random:1:8 urandom:1:9 tty:5:0 ptmx:5:2 net/tun:10:200; do
    mknod -m 666 "$1/dev/${node%%:*}" c $(echo "${node#*:}" | tr : ' ')
done
ln -s /proc/self/fd "$1/dev/fd"
mount --bind /dev/pts "$1/dev/pts"
mount -t tmpfs shm "$1/dev/shm"
mount --rbind "$1/dev" /dev
for place in etc var/lib var/cache var/log; do
    mount --bind "$1/$place" "/$place/libvirt"
done
mount -t tmpfs -o mode=755 run /run
hostname "$2"
exec libvirtd --config "/etc/libvirt/libvirtd.conf"
"""

_QEMU_CONF = """
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
migration_address = "{address}"
migration_host = "{address}"
"""

_LIBVIRTD_CONF = """
unix_sock_dir = "{sockets}"
auth_unix_rw = "none"
auth_unix_ro = "none"
host_uuid = "{uuid}"
log_outputs = "3:stderr"
"""


class Libvirtd:
    """One daemon. `start` it; `stop` ends it by its PID."""

    def __init__(self, host: HostLayout, home: Path) -> None:
        self._host = host
        self._root = home / f"libvirt-{host.name}"
        self._sockets = self._root / "sockets"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """Reaches it from anywhere on this machine: a Unix socket belongs to no network namespace."""
        return f"qemu+unix:///system?socket={self._sockets}/libvirt-sock"

    @property
    def images(self) -> Path:
        """What its guests see as /var/lib/libvirt/images: the same path on both hosts, as a migration wants it."""
        return self._root / "var/lib/images"

    def start(self) -> None:
        """Returns when it answers, with QEMU's features already asked for. Raises Failed `bench-libvirt`."""
        self._write_files()
        command = [*exec_prefix(self._host.namespace), "unshare", "--mount", "--uts"]
        command += ["sh", "-c", _ENTER, "libvirtd", str(self._root), self._host.namespace]
        with (self._root / "libvirtd.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + _START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise Failed("bench-libvirt", f"libvirtd of {self._host.name} is not up: {self.last_words()}", "")
            time.sleep(0.1)

    def stop(self) -> None:
        """SIGTERM, and SIGKILL if that does not help. Idempotent; guests are not touched."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def last_words(self) -> str:
        """The end of its log, for messages."""
        log = self._root / "libvirtd.log"
        return " / ".join(log.read_text(errors="replace").splitlines()[-3:]) if log.exists() else ""

    def _write_files(self) -> None:
        for name in (*_PRIVATE, "sockets", "var/lib/images"):
            (self._root / name).mkdir(parents=True, exist_ok=True)
        address = self._host.migration_address
        settings = _LIBVIRTD_CONF.format(sockets=self._sockets, uuid=uuid.uuid4())
        (self._root / "etc/libvirtd.conf").write_text(settings)
        (self._root / "etc/qemu.conf").write_text(_QEMU_CONF.format(address=address))

    def _answers(self) -> bool:
        asked = subprocess.run(["virsh", "-c", self.uri, "version"], capture_output=True, stdin=subprocess.DEVNULL)
        return asked.returncode == 0
