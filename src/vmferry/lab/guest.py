"""Builds the lab's small guest: Debian's cloud kernel and an initramfs with busybox and the workload of guest_src/.

For the lab, the demo, the bench and the tests. It downloads the kernel package with apt (never installs it) and keeps
everything it makes in one cache directory, keyed by content, so that a second call only looks. What the guest does is
chosen on the kernel command line: see `guest_cmdline`.
"""

from __future__ import annotations

import fcntl
import hashlib
import lzma
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vmferry.lab.archive import Entry, character_device, directory, pack_cpio, program
from vmferry.model.errors import Failed

SOURCES = Path(__file__).parent / "guest_src"
BUSYBOX = Path("/bin/busybox")
KERNEL_PACKAGE = "linux-image-cloud-amd64"
LAYOUT = "1"  # part of the cache key: raise it when this module packs something else

# In the order in which they depend on each other. virtio and its ring are built into some Debian kernels.
MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
    "button",
    "evdev",
)

BOOT_CMDLINE = "console=ttyS0 quiet panic=-1"


@dataclass(frozen=True, slots=True)
class GuestImages:
    """Paths for direct kernel boot."""

    kernel: Path
    initrd: Path


def guest_cmdline(**options: str | int) -> str:
    """A kernel command line: `guest_cmdline(ip="10.77.0.50/24", udp=7)` gives `... vf.ip=10.77.0.50/24 vf.udp=7`.

    ip, ip1..ip9 (address of eth0, eth1...), gw; dirty (MB/s over wss MiB, default 64), check (MB/s checked, default 4);
    disk (1 writes records, `verify` only checks), diskrate (records/s), diskarea (MiB), diskdev, fill (MiB of random
    data, once); udp, tcp, stream (ports of the echo and stream services); status (port, default 8); beat (ms between
    lines on the console, 0 for none); shell (1 for a shell on the console).
    """
    return " ".join([BOOT_CMDLINE, *(f"vf.{name}={value}" for name, value in options.items())])


def build_guest(output: Path | None = None) -> GuestImages:
    """Gives kernel and initramfs, from the cache if nothing changed; with `output`, copies in that directory.

    Idempotent, and safe to call from several processes at once. Raises Failed `guest-tool-missing`,
    `guest-kernel-unavailable` or `guest-build-failed`.
    """
    cache = _cache_directory()
    with _locked(cache / "lock"):
        kernel_tree = _ensure_kernel_tree(cache)
        images = _ensure_images(cache, kernel_tree)
    if output is None:
        return images
    output.mkdir(parents=True, exist_ok=True)
    copies = GuestImages(output / "vmlinuz", output / "initrd.img")
    shutil.copyfile(images.kernel, copies.kernel)
    shutil.copyfile(images.initrd, copies.initrd)
    return copies


def _cache_directory() -> Path:
    named = os.environ.get("XDG_CACHE_HOME")
    if named:
        place = Path(named) / "vmferry-lab"
    elif os.geteuid() == 0:
        place = Path("/var/cache/vmferry-lab")
    else:
        place = Path.home() / ".cache" / "vmferry-lab"
    place.mkdir(parents=True, exist_ok=True)
    return place


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(argv: list[str], code: str, fix: str, cwd: Path | None = None) -> str:
    plain = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(argv, capture_output=True, text=True, cwd=cwd, stdin=subprocess.DEVNULL, env=plain)
    except FileNotFoundError as missing:
        raise Failed("guest-tool-missing", f"The program {argv[0]} is not installed.", "Run ./dev setup.") from missing
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise Failed(code, f"“{' '.join(argv[:2])}” failed: {last}", fix)
    return done.stdout


def _ensure_kernel_tree(cache: Path) -> Path:
    """The unpacked kernel package. Once there it is used as it is: delete the cache to get a newer one."""
    kept = sorted(cache.glob("linux-image-*"))
    if kept:
        return kept[-1]
    fix = "Run apt-get update and check the machine's package sources."
    code = "guest-kernel-unavailable"
    depends = _run(["apt-cache", "depends", "--important", KERNEL_PACKAGE], code, fix)
    concrete = [line.split()[-1] for line in depends.splitlines() if "Depends: linux-image-" in line]
    if not concrete:
        raise Failed(code, f"The package {KERNEL_PACKAGE} is not known to apt.", fix)
    with _scratch(cache) as scratch:
        _run(["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", concrete[0]], code, fix, cwd=scratch)
        (package,) = scratch.glob("*.deb")
        tree = scratch / "tree"
        _run(["dpkg", "-x", str(package), str(tree)], code, "Delete the lab's cache directory and try again.")
        tree.rename(cache / concrete[0])
    return cache / concrete[0]


@contextmanager
def _scratch(cache: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=cache, prefix="making-") as name:
        yield Path(name)


def _ensure_images(cache: Path, kernel_tree: Path) -> GuestImages:
    place = cache / f"guest-{_content_key(kernel_tree)}"
    images = GuestImages(place / "vmlinuz", place / "initrd.img")
    if place.is_dir():
        return images
    with _scratch(cache) as scratch:
        made = scratch / "images"
        made.mkdir()
        kernel = next((kernel_tree / "boot").glob("vmlinuz-*"))
        shutil.copyfile(kernel, made / "vmlinuz")
        workload = _compile_workload(scratch)
        (made / "initrd.img").write_bytes(pack_cpio(_contents(kernel_tree, workload)))
        for made_file in made.iterdir():
            made_file.chmod(0o644)
        made.rename(place)
    return images


def _content_key(kernel_tree: Path) -> str:
    if not BUSYBOX.exists():
        raise Failed("guest-tool-missing", "busybox is not installed.", "Run ./dev setup (package busybox-static).")
    digest = hashlib.sha256(f"{LAYOUT} {kernel_tree.name} ".encode())
    for source in sorted([*SOURCES.iterdir(), BUSYBOX]):
        content = source.read_bytes()
        digest.update(f"{source.name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:16]


def _compile_workload(scratch: Path) -> bytes:
    target = scratch / "vfguest"
    sources = sorted(str(source) for source in SOURCES.glob("*.c"))
    flags = ["-O2", "-static", "-s", "-Wall", "-Wextra", "-Werror"]
    _run(["gcc", *flags, "-o", str(target), *sources], "guest-build-failed", "This is a defect of vmferry; report it.")
    return target.read_bytes()


def _contents(kernel_tree: Path, workload: bytes) -> Iterator[Entry]:
    for name in ("bin", "dev", "proc", "sys", "modules"):
        yield directory(name)
    yield character_device("dev/console", 5, 1)
    yield program("init", (SOURCES / "init").read_bytes())
    yield program("bin/busybox", BUSYBOX.read_bytes())
    yield program("bin/vfguest", workload)
    order = []
    for name in MODULES:
        content = _module_content(kernel_tree, name)
        if content is not None:
            order.append(f"{name}.ko\n")
            yield program(f"modules/{name}.ko", content)
    yield program("modules/order", "".join(order).encode())


def _module_content(kernel_tree: Path, name: str) -> bytes | None:
    """The module, uncompressed; None when this kernel has it built in. Debian 13 compresses modules with xz."""
    library = next(tree for tree in (kernel_tree / "lib/modules", kernel_tree / "usr/lib/modules") if tree.is_dir())
    for found in sorted(library.rglob(f"{name}.ko*")):
        content = found.read_bytes()
        return lzma.decompress(content) if found.suffix == ".xz" else content
    return None
