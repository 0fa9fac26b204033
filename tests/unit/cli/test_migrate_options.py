"""The options of a migration as they are typed, and the specification of a VM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vmferry.cli.options import read_network, read_options, read_storage
from vmferry.cli.spec import read_spec
from vmferry.model.errors import WrongInput
from vmferry.model.migration import MigrateOptions, PostCopy, Verify

TYPED: dict[str, Any] = {
    "mode": "live",
    "max_blackout": "300ms",
    "deadline": None,
    "bandwidth": None,
    "max_slowdown": "50%",
    "post_copy": "never",
    "verify": "disks",
    "keep_source": False,
    "storage": (),
    "network": (),
}


def test_nothing_typed_is_the_default() -> None:
    assert read_options(TYPED) == MigrateOptions()


def test_everything_typed() -> None:
    typed = TYPED | {
        "max_blackout": "0.1s",
        "deadline": "10m",
        "bandwidth": "500mbit",
        "max_slowdown": "20",
        "post_copy": "allow",
        "verify": "none",
        "keep_source": True,
        "storage": ("fast", "root=local"),
        "network": ("lan=office",),
    }
    assert read_options(typed) == MigrateOptions(
        max_blackout_ms=100,
        deadline_ms=600_000,
        bandwidth_bps=500_000_000,
        max_slowdown_percent=20,
        post_copy=PostCopy.ALLOW,
        verify=Verify.NONE,
        keep_source=True,
        storage={"": "fast", "root": "local"},
        network={"lan": "office"},
    )


def test_memory_that_follows_later_cannot_be_proven() -> None:
    with pytest.raises(WrongInput, match="cannot be compared"):
        read_options(TYPED | {"post_copy": "allow", "verify": "all"})


@pytest.mark.parametrize("mode", ["quick", "cold"])
def test_modes_that_are_not_there_are_said_to_be_not_there(mode: str) -> None:
    with pytest.raises(WrongInput, match="not there yet"):
        read_options(TYPED | {"mode": mode})


@pytest.mark.parametrize("given", [("a", "b"), ("=a",), ("a=",), ("",), ("d=a", "d=b")])
def test_storage_that_is_not_understood(given: tuple[str, ...]) -> None:
    with pytest.raises(WrongInput) as caught:
        read_storage(given)
    assert caught.value.code == "bad-storage" and caught.value.exit_status == 2


@pytest.mark.parametrize("given", [("a",), ("=a",), ("a=",), ("a=b", "a=c")])
def test_network_that_is_not_understood(given: tuple[str, ...]) -> None:
    with pytest.raises(WrongInput) as caught:
        read_network(given)
    assert caught.value.code == "bad-network"


def test_paths_in_a_specification_count_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "vm.toml"
    path.write_text(
        'name = "web1"\n[boot]\nkernel = "vmlinuz"\ninitrd = "/boot/initrd"\n[[disk]]\nimage = "base.qcow2"\n'
    )
    spec = read_spec(path)
    assert spec["boot"] == {"kernel": str(tmp_path / "vmlinuz"), "initrd": "/boot/initrd"}
    assert spec["disk"] == [{"image": str(tmp_path / "base.qcow2")}]


@pytest.mark.parametrize("text", ["name = ", "when = 2026-01-01", "cpus = inf", b"\xff".decode("latin-1") + "= 1"])
def test_a_specification_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "vm.toml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(WrongInput) as caught:
        read_spec(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("text", ["disk = 3", "disk = [3]", "boot = 1"])
def test_what_a_specification_means_is_for_the_host_to_judge(tmp_path: Path, text: str) -> None:
    path = tmp_path / "vm.toml"
    path.write_text(text)
    assert read_spec(path)
