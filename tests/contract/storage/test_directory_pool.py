"""Directory pools with real images: what is made, what is refused, and that nothing is overwritten or left behind."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmferry.model.errors import Conflict, Failed, NotFound, Refused, VmferryError, WrongInput
from vmferry.storage.aside import AsideNote
from vmferry.storage.boot_files import accept_boot_file, boot_file_name, store_boot_file
from vmferry.storage.pool import DirectoryPool, ImageRequest, ImportRequest, observe_image

MIB = 1 << 20
VM = "0b9e3c6a"
NOBODY = (65534, 65534)
NOTE = AsideNote(VM, "web1", "m-0123456789ab", 3, "2026-11-23T04:00:00Z")


@pytest.fixture
async def pool(tmp_path: Path) -> DirectoryPool:
    pool = DirectoryPool("local", tmp_path / "pool")
    await pool.ensure_pool()
    return pool


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=755", "tmpfs", mount], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


def files_in(path: Path) -> set[str]:
    return {str(found.relative_to(path)) for found in path.rglob("*") if found.is_file() or found.is_symlink()}


def qemu_img(*arguments: object) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


# -- the pool itself -------------------------------------------------------------------------------------------------


async def test_a_pool_keeps_its_identity(tmp_path: Path) -> None:
    pool = DirectoryPool("local", tmp_path / "a" / "pool")
    found = await pool.ensure_pool()
    assert await pool.ensure_pool() == found
    assert await pool.ensure_pool(found) == found
    with pytest.raises(Refused) as caught:
        await pool.ensure_pool("00000000-0000-0000-0000-000000000000")
    assert caught.value.code == "pool-changed"
    (pool.path / ".vmferry-pool").write_text("rubbish")
    with pytest.raises(Failed) as failed:
        await pool.ensure_pool()
    assert failed.value.code == "bad-pool-identity"


async def test_a_known_pool_is_not_made_anew_where_it_is_not_mounted(tmp_path: Path) -> None:
    pool = DirectoryPool("local", tmp_path / "gone")
    with pytest.raises(NotFound):
        await pool.ensure_pool("00000000-0000-0000-0000-000000000000")
    assert not pool.path.exists()
    pool.path.mkdir()
    with pytest.raises(Refused):
        await pool.ensure_pool("00000000-0000-0000-0000-000000000000")
    assert not files_in(pool.path)


async def test_many_at_once_agree_on_the_identity(tmp_path: Path) -> None:
    pool = DirectoryPool("local", tmp_path / "pool")
    assert len(set(await asyncio.gather(*(pool.ensure_pool() for _ in range(8))))) == 1
    assert files_in(pool.path) == {".vmferry-pool"}


async def test_a_pool_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "pool").write_text("x")
    with pytest.raises(VmferryError):
        await DirectoryPool("local", tmp_path / "pool").ensure_pool()
    with pytest.raises(NotFound):
        await DirectoryPool("local", tmp_path / "none").observe_room()


async def test_a_pool_that_the_guests_cannot_reach(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o700)
    with pytest.raises(Refused) as caught:
        await DirectoryPool("local", tmp_path / "closed" / "pool", NOBODY).ensure_pool()
    assert caught.value.code == "pool-unreachable"


async def test_a_read_only_pool(small_disk: Path) -> None:
    pool = DirectoryPool("local", small_disk / "pool")
    await pool.ensure_pool()
    await asyncio.to_thread(subprocess.run, ["mount", "-o", "remount,ro", small_disk], check=True)
    for act in (pool.ensure_pool(), pool.create_image(ImageRequest(VM, "root", MIB))):
        with pytest.raises(Failed) as caught:
            await act
        assert caught.value.code == "read-only"


async def test_room(small_disk: Path) -> None:
    room = await DirectoryPool("local", small_disk).observe_room()
    assert room.total_bytes == 4 * MIB and 3 * MIB < room.free_bytes <= 4 * MIB


# -- new images ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
async def test_a_new_image_is_sparse_and_of_exactly_that_size(pool: DirectoryPool, image_format: str) -> None:
    path = await pool.create_image(ImageRequest(VM, "root", 2048 * MIB, image_format))
    assert path.parent == pool.path / VM and path.name.startswith("root-") and path.suffix == f".{image_format}"
    info = await observe_image(path, image_format)
    assert (info.format, info.virtual_size, info.backing) == (image_format, 2048 * MIB, ())
    assert info.allocated_bytes < MIB and path.stat().st_blocks * 512 < MIB
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_images_belong_to_the_guests_user_and_directories_do_not(pool: DirectoryPool) -> None:
    owned = DirectoryPool("local", pool.path, NOBODY)
    path = await owned.create_image(ImageRequest(VM, "root", MIB))
    assert (path.stat().st_uid, path.stat().st_gid) == NOBODY
    assert path.parent.stat().st_uid == os.geteuid() and not path.parent.stat().st_mode & 0o022


async def test_an_image_on_a_base_layer(pool: DirectoryPool) -> None:
    base = await pool.create_image(ImageRequest(VM, "base", 8 * MIB))
    top = await pool.create_image(ImageRequest(VM, "root", 8 * MIB, backing=base))
    assert (await observe_image(top, "qcow2")).backing == (base,)


async def test_nothing_is_overwritten(pool: DirectoryPool) -> None:
    planned = pool.plan_path(VM, "root", "raw")
    await pool.create_image(ImageRequest(VM, "root", MIB, "raw"), planned)
    planned.write_bytes(b"precious")
    with pytest.raises(Conflict):
        await pool.create_image(ImageRequest(VM, "root", MIB, "raw"), planned)
    assert planned.read_bytes() == b"precious"
    assert files_in(pool.path / VM) == {planned.name}


async def test_two_at_once_for_one_path(pool: DirectoryPool) -> None:
    planned = pool.plan_path(VM, "root", "qcow2")
    acts = [pool.create_image(ImageRequest(VM, "root", MIB), planned) for _ in range(4)]
    results = await asyncio.gather(*acts, return_exceptions=True)
    assert sorted(type(result).__name__ for result in results)[:3] == ["Conflict"] * 3
    assert files_in(pool.path / VM) == {planned.name}


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "a\x00b", "-rf", "Root", "x" * 64, ".hidden", "a b", "é"])
async def test_hostile_names(pool: DirectoryPool, name: str) -> None:
    for request in (ImageRequest(VM, name, MIB), ImageRequest(name, "root", MIB), ImageRequest(VM, "root", MIB, name)):
        with pytest.raises(WrongInput):
            await pool.create_image(request)
    assert files_in(pool.path) == {".vmferry-pool"}


@pytest.mark.parametrize("size", [0, -512, 100, 1 << 61])
async def test_impossible_sizes(pool: DirectoryPool, size: int) -> None:
    with pytest.raises(WrongInput):
        await pool.create_image(ImageRequest(VM, "root", size))


@pytest.mark.parametrize("path", ["/etc/passwd", "pool/../../x/root.raw", "a/root.raw", "0b9e/.vmferry-pool/x"])
async def test_only_paths_of_the_pool(pool: DirectoryPool, path: str) -> None:
    target = pool.path / path
    for act in (
        pool.create_image(ImageRequest(VM, "root", MIB), target),
        pool.remove_image(target),
        pool.set_aside(target, NOTE),
    ):
        if path == "a/root.raw":
            act.close()
            continue
        with pytest.raises((Refused, WrongInput)):
            await act


async def test_room_used_up_leaves_nothing(small_disk: Path, tmp_path: Path) -> None:
    source = tmp_path / "big.raw"
    source.write_bytes(os.urandom(8 * MIB))
    pool = DirectoryPool("local", small_disk / "pool")
    await pool.ensure_pool()
    with pytest.raises(Failed) as caught:
        await pool.import_image(ImportRequest(VM, "root", source))
    assert caught.value.code == "no-space"
    assert files_in(pool.path) == {".vmferry-pool"}
    assert (await pool.observe_room()).free_bytes > 3 * MIB


async def test_a_cancelled_import_leaves_nothing(pool: DirectoryPool, tmp_path: Path) -> None:
    fifo_fed = tmp_path / "big.raw"
    with fifo_fed.open("wb") as file:
        for _ in range(64):
            file.write(os.urandom(MIB))
    task = asyncio.create_task(pool.import_image(ImportRequest(VM, "root", fifo_fed)))
    while not task.done() and not any(path.name.endswith(".part") for path in pool.path.rglob("*")):  # noqa: ASYNC110
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert files_in(pool.path) == {".vmferry-pool"}


# -- imported images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["qcow2", "raw", "vhdx", "vpc", "vmdk"])
@pytest.mark.parametrize("wanted", ["qcow2", "raw"])
async def test_every_format_comes_in(pool: DirectoryPool, tmp_path: Path, image_format: str, wanted: str) -> None:
    content = tmp_path / "content.raw"
    content.write_bytes(os.urandom(MIB) + bytes(6 * MIB) + os.urandom(MIB))
    source = tmp_path / "source.img"
    options = ["-o", "force_size=on"] if image_format == "vpc" else []
    qemu_img("convert", "-f", "raw", "-O", image_format, *options, content, source)
    path = await pool.import_image(ImportRequest(VM, "root", source, format=wanted))
    info = await observe_image(path, wanted)
    assert info.virtual_size == 8 * MIB and info.allocated_bytes < 4 * MIB
    qemu_img("compare", "-f", "raw", "-F", wanted, content, path)


async def test_an_image_can_grow_and_not_shrink(pool: DirectoryPool, tmp_path: Path) -> None:
    source = tmp_path / "a.raw"
    source.write_bytes(b"x" * 1000)
    path = await pool.import_image(ImportRequest(VM, "root", source))
    assert (await observe_image(path, "qcow2")).virtual_size == 1024
    path = await pool.import_image(ImportRequest(VM, "root", source, size_bytes=MIB))
    assert (await observe_image(path, "qcow2")).virtual_size == MIB
    with pytest.raises(WrongInput, match="more than asked for"):
        await pool.import_image(ImportRequest(VM, "root", source, size_bytes=512))


def hostile(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / f"{kind}.img"
    secret = tmp_path / "secret.raw"
    secret.write_bytes(b"secret!!" * 8192)
    if kind == "backing":
        qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw", path, "1M")
    elif kind == "backing-json":
        backing = 'json:{"driver":"raw","file":{"driver":"file","filename":"/etc/passwd"}}'
        qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", "raw", path, "1M")
    elif kind == "data-file":
        qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={secret}.d,data_file_raw=on", path, "64k")
    elif kind == "vmdk-flat":
        qemu_img("create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", path, "64k")
    elif kind == "vmdk-descriptor":
        lines = ("# Disk DescriptorFile", "version=1", "CID=1", "parentCID=ffffffff", 'createType="monolithicFlat"')
        path.write_text("\n".join((*lines, f'RW 128 FLAT "{secret}" 0\n')))
    elif kind == "vmdk-parent":
        qemu_img("create", "-q", "-f", "vmdk", tmp_path / "parent.vmdk", "1M")
        qemu_img("create", "-q", "-f", "vmdk", "-b", tmp_path / "parent.vmdk", "-F", "vmdk", path, "1M")
    return path


@pytest.mark.parametrize(
    "kind", ["backing", "backing-json", "data-file", "vmdk-flat", "vmdk-descriptor", "vmdk-parent"]
)
async def test_an_image_that_names_other_files_is_refused(pool: DirectoryPool, tmp_path: Path, kind: str) -> None:
    with pytest.raises(Refused) as caught:
        await pool.import_image(ImportRequest(VM, "root", hostile(tmp_path, kind)))
    assert caught.value.code == "leans-on-others"
    assert files_in(pool.path) == {".vmferry-pool"}


async def test_a_chain_comes_in_when_asked_for(pool: DirectoryPool, tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"base" * 16384)
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", tmp_path / "top.qcow2")
    request = ImportRequest(VM, "root", tmp_path / "top.qcow2", format="raw", follow=True)
    assert (await pool.import_image(request)).read_bytes() == base.read_bytes()


async def test_broken_and_odd_sources(pool: DirectoryPool, tmp_path: Path) -> None:
    (tmp_path / "short.qcow2").write_bytes(b"QFI\xfb\0\0\0\3")
    (tmp_path / "broken.qcow2").write_bytes(b"QFI\xfb\0\0\0\3" + bytes(200))
    (tmp_path / "broken.vhdx").write_bytes(b"vhdxfile" + bytes(5000))
    (tmp_path / "broken.vmdk").write_bytes(b"KDMV" + b"\xff" * 600)
    os.mkfifo(tmp_path / "fifo")
    for name in ("short.qcow2", "broken.qcow2", "broken.vhdx", "broken.vmdk", "fifo", "none", "."):
        with pytest.raises(VmferryError):
            await pool.import_image(ImportRequest(VM, "root", tmp_path / name))
    for name in ("nbd://127.0.0.1/x", 'json:{"driver":"null-co"}', "relative.raw"):
        with pytest.raises(WrongInput, match="absolute"):
            await pool.import_image(ImportRequest(VM, "root", Path(name)))
    assert files_in(pool.path) == {".vmferry-pool"}


# -- removed and set aside -------------------------------------------------------------------------------------------


async def test_removed_with_its_directory_when_that_is_empty(pool: DirectoryPool) -> None:
    first = await pool.create_image(ImageRequest(VM, "root", MIB))
    second = await pool.create_image(ImageRequest(VM, "data", MIB))
    assert await pool.remove_image(first) and second.exists()
    assert await pool.remove_image(second) and not second.parent.exists()
    assert not await pool.remove_image(second)


async def test_links_are_never_followed(pool: DirectoryPool, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    victim = outside / "root-1.raw"
    victim.write_bytes(b"precious")
    (pool.path / "linked").symlink_to(outside)
    real = await pool.create_image(ImageRequest(VM, "root", MIB))
    (real.parent / "link-1.raw").symlink_to(victim)
    through_directory = pool.path / "linked" / victim.name
    for path in (through_directory, real.parent / "link-1.raw"):
        for act in (pool.remove_image(path), pool.set_aside(path, NOTE)):
            with pytest.raises(VmferryError):
                await act
    with pytest.raises(VmferryError):
        await pool.create_image(ImageRequest("linked", "root", MIB))
    assert victim.read_bytes() == b"precious" and files_in(outside) == {victim.name}
    assert [image.path for image in await pool.list_images()] == [real]


async def test_set_aside_and_back(pool: DirectoryPool) -> None:
    path = await pool.create_image(ImageRequest(VM, "root", MIB))
    content = path.read_bytes()
    away = await pool.set_aside(path, NOTE)
    assert not path.exists() and away.read_bytes() == content
    assert await pool.set_aside(path, NOTE) == away
    assert await pool.set_aside(away, NOTE) == away
    (found,) = await pool.list_images()
    assert (found.path, found.aside, found.partial, found.vm_id) == (away, NOTE, False, VM)
    assert await pool.restore_aside(away) == path
    assert await pool.restore_aside(away) == path
    assert await pool.restore_aside(path) == path
    assert path.read_bytes() == content and files_in(path.parent) == {path.name}


async def test_an_image_set_aside_is_removed_with_its_note(pool: DirectoryPool) -> None:
    away = await pool.set_aside(await pool.create_image(ImageRequest(VM, "root", MIB)), NOTE)
    assert await pool.remove_image(away) and not away.parent.exists()


async def test_restoring_overwrites_nothing(pool: DirectoryPool) -> None:
    path = await pool.create_image(ImageRequest(VM, "root", MIB, "raw"))
    away = await pool.set_aside(path, NOTE)
    path.write_bytes(b"newer")
    with pytest.raises(Conflict):
        await pool.restore_aside(away)
    assert path.read_bytes() == b"newer" and away.exists()
    with pytest.raises(NotFound):
        await pool.set_aside(pool.path / VM / "none-1.raw", NOTE)


async def test_what_an_act_left_half_made_is_shown(pool: DirectoryPool) -> None:
    path = await pool.create_image(ImageRequest(VM, "root", MIB))
    left = path.with_name(f".{path.name}.0123abcd.part")
    path.rename(left)
    (found,) = await pool.list_images()
    assert found.partial and found.path == left
    assert await pool.remove_image(left)


async def test_an_image_in_use_can_be_looked_at(pool: DirectoryPool) -> None:
    path = await pool.create_image(ImageRequest(VM, "root", MIB))
    sock = pool.path.parent / "s"
    process = await asyncio.create_subprocess_exec("qemu-nbd", "-f", "qcow2", "-k", sock, "-t", path)
    try:
        while not sock.exists():
            assert process.returncode is None
            await asyncio.sleep(0.01)
        assert (await observe_image(path, "qcow2")).virtual_size == MIB
        with pytest.raises(Conflict) as caught:
            await pool.import_image(ImportRequest(VM, "copy", path))
        assert caught.value.code == "image-in-use"
    finally:
        process.kill()
        await process.wait()


async def test_what_is_no_such_image(pool: DirectoryPool, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        await observe_image(tmp_path / "none", "qcow2")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(Failed):
        await observe_image(tmp_path / "text", "qcow2")


# -- kernels ---------------------------------------------------------------------------------------------------------


async def test_boot_files_are_named_by_their_content(tmp_path: Path) -> None:
    source = tmp_path / "vmlinuz"
    source.write_bytes(b"kernel" * 1000)
    name = await store_boot_file(tmp_path / "vm", source)
    assert name == boot_file_name(source.read_bytes())
    assert await store_boot_file(tmp_path / "vm", source) == name
    assert files_in(tmp_path / "vm") == {name}
    other, part = tmp_path / "other", tmp_path / "other" / ".part"
    other.mkdir()
    part.write_bytes(source.read_bytes())
    await accept_boot_file(part, other / name)
    assert files_in(other) == {name} and (other / name).read_bytes() == source.read_bytes()
    for wrong in (name, "boot-"):
        part.write_bytes(b"something else")
        with pytest.raises(Refused):
            await accept_boot_file(part, other / wrong)
        assert files_in(other) == {name} and (other / name).read_bytes() == source.read_bytes()
    for bad in (tmp_path, tmp_path / "none"):
        with pytest.raises(VmferryError):
            await store_boot_file(tmp_path / "vm", bad)


async def test_a_damaged_boot_file_is_replaced(tmp_path: Path) -> None:
    source = tmp_path / "vmlinuz"
    source.write_bytes(b"kernel" * 1000)
    name = await store_boot_file(tmp_path / "vm", source)
    (tmp_path / "vm" / name).write_bytes(b"damage" * 1000)
    assert await store_boot_file(tmp_path / "vm", source) == name
    assert (tmp_path / "vm" / name).read_bytes() == source.read_bytes()
