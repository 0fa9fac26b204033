"""What an image is: format, sizes, the layers below it, as qemu-img tells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmferry.model.errors import Conflict, Failed
from vmferry.model.vm import VmSpec
from vmferry.storage.qemu_img import query_image


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """An image. Sizes in bytes: `virtual_size` is what a guest sees, `allocated_bytes` what this layer takes up.

    `backing` are the layers below, nearest first (only if asked for the chain). `data_file` and `encrypted` are of the
    top layer; `snapshots` the names of its internal ones.
    """

    format: str
    virtual_size: int
    allocated_bytes: int
    backing: tuple[Path, ...] = ()
    encrypted: bool = False
    snapshots: tuple[str, ...] = ()
    data_file: str = ""


async def observe_image(path: Path, format_name: str, *, chain: bool = True) -> ImageInfo:
    """What is known of the image at `path` in `format_name` (qcow2, raw); with `chain` also its layers.

    Works on an image that a guest uses. Raises NotFound `no-such-file` and the other errors of storage; Failed
    `image-error` for a file that is not of that format.
    """
    answer = await query_image(path, format_name, chain=chain)
    layers = answer if isinstance(answer, list) else [answer]
    try:
        return _info(layers)
    except (KeyError, TypeError, IndexError) as error:
        raise Failed("image-error", f"qemu-img says nothing useful of {path}.", "Update qemu-utils.") from error


def _info(layers: list[Mapping[str, Any]]) -> ImageInfo:
    top = layers[0]
    specific = top.get("format-specific", {}).get("data", {})
    return ImageInfo(
        format=str(top["format"]),
        virtual_size=int(top["virtual-size"]),
        allocated_bytes=int(top["actual-size"]),
        backing=tuple(Path(layer["filename"]) for layer in layers[1:]),
        encrypted=bool(top.get("encrypted", False)),
        snapshots=tuple(str(snapshot["name"]) for snapshot in top.get("snapshots", ())),
        data_file=str(specific.get("data-file", "")),
    )


def require_unshared(path: Path, users: Iterable[VmSpec]) -> None:
    """Raises Conflict `image-in-use` if one of `users` (VMs that are defined) has a disk on that image. Pure.

    QEMU's own locks keep two running guests from one image; this finds it before they run, also as a base layer: what
    others lean on must not be written to.
    """
    for vm in users:
        for disk in vm.disks:
            if str(path) in (disk.path, disk.backing):
                role = "uses it" if str(path) == disk.path else "has it as its base layer"
                raise Conflict(
                    "image-in-use", f"{path}: disk {disk.name} of VM {vm.name} {role}.", "Use another image."
                )
