"""What a user writes about a VM: every fault is named at once, whatever is in it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.host.definition import BootDefinition, DiskDefinition, NicDefinition, VmDefinition, read_definition
from vmferry.model.errors import WrongInput

WHOLE: dict[str, Any] = {
    "name": "web1",
    "cpus": 2,
    "memory": "512MiB",
    "cpu_model": "Westmere-v1",
    "boot": {"kernel": "/k", "initrd": "/i", "cmdline": "console=ttyS0 quiet"},
    "disk": [
        {"name": "root", "pool": "local", "size": "2GiB", "format": "raw"},
        {"name": "data", "pool": "local", "image": "/base.qcow2", "backing": True},
    ],
    "nic": [{"switch": "lan", "mac": "52:54:00:AB:cd:ef"}, {"switch": "lan"}],
}


def faults(document: object) -> str:
    with pytest.raises(WrongInput) as caught:
        read_definition(document)
    assert caught.value.code == "bad-vm"
    return caught.value.message


def test_a_whole_definition() -> None:
    assert read_definition(WHOLE) == VmDefinition(
        name="web1",
        cpus=2,
        memory_bytes=512 << 20,
        cpu_model="Westmere-v1",
        boot=BootDefinition("/k", "/i", "console=ttyS0 quiet", ""),
        disks=(
            DiskDefinition("root", "local", 2 << 30, "", False, "raw"),
            DiskDefinition("data", "local", 0, "/base.qcow2", True, "qcow2"),
        ),
        nics=(NicDefinition("lan", "52:54:00:ab:cd:ef"), NicDefinition("lan", "")),
    )


def test_the_smallest_definition() -> None:
    found = read_definition({"name": "a", "memory": "16MiB", "boot": {"kernel": "/k"}})
    assert (found.cpus, found.cpu_model, found.disks, found.nics) == (1, "auto", (), ())


def test_every_fault_is_named_at_once_and_once() -> None:
    message = faults(
        {
            "name": "Web_1",
            "cpus": 0,
            "memory": "7MiB",
            "boot": {"kernel": "/k", "firmware": "floppy", "cmdline": "x"},
            "disk": [{"name": "a b", "size": "1000"}, {"name": "root", "pool": "p", "size": "1GiB", "format": "vhd"}],
            "nic": [{"mac": "01:00:5e:00:00:01"}, "lan"],
            "zork": 1,
        }
    )
    for part in (
        "vm.name: ", "vm.cpus: ", "vm.memory: ", "boot: give either", "boot.firmware: 'floppy'", "boot: initrd",
        "disk[0].name: ", "disk[0].pool: is missing", "disk[0].size: ", "disk[1].format: 'vhd'",
        "nic[0].switch: is missing", "nic[0].mac: ", "nic[1]: a table", "vm.zork: there is no such key",
    ):  # fmt: skip
        assert message.count(part) == 1, (part, message)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"name": None}, "vm.name: is missing"),
        ({"name": 5}, "vm.name: must be a text"),
        ({"name": ""}, "vm.name: '' cannot be"),
        ({"name": "a" * 64}, "cannot be the name of a VM"),
        ({"name": "web1\n"}, "vm.name: must be a text of one line"),
        ({"name": "../x"}, "'../x' cannot be the name of a VM"),
        ({"cpus": True}, "vm.cpus"),
        ({"cpus": "2"}, "vm.cpus"),
        ({"cpus": 2.0}, "vm.cpus"),
        ({"cpus": 256}, "vm.cpus"),
        ({"memory": 512}, "vm.memory: must be a text"),
        ({"memory": "0"}, "vm.memory: must be whole MiB"),
        ({"memory": "16.5MiB"}, "vm.memory: must be whole MiB"),
        ({"memory": "9" * 19 + "TiB"}, "is not a size"),
        ({"boot": None}, "boot: a table"),
        ({"boot": {}}, "boot: give either"),
        ({"boot": {"kernel": "/k\x1b[2J"}}, "boot.kernel: must be a text of one line"),
        ({"boot": {"kernel": "/k", "cmdline": "\ud800"}}, "boot.cmdline: must be a text of one line"),
        ({"boot": {"firmware": "uefi"}, "disk": []}, "boot: a firmware boots from the first disk"),
        ({"disk": {"name": "root"}}, "vm.disk: write [[disk]]"),
        ({"disk": [WHOLE["disk"][0]] * 13}, "at most 12"),
        ({"disk": [WHOLE["disk"][0]] * 2}, "two disks are named 'root'"),
        ({"disk": [{"name": "a", "pool": "p", "size": ""}]}, "disk[0].size: '' is not a size"),
        ({"disk": [{"name": "a", "pool": "p"}]}, "disk[0].size: is missing"),
        ({"disk": [{"name": "a", "pool": "p", "size": "1048577"}]}, "multiple of 512"),
        ({"disk": [{"name": "a", "pool": "p", "size": "1GiB", "backing": True}]}, "only with an image"),
        ({"disk": [{"name": "a", "pool": "p", "image": "/i", "backing": 1}]}, "disk[0].backing"),
        ({"disk": [{"name": "a", "pool": "p", "image": "/i", "backing": True, "format": "raw"}]}, "needs format qcow2"),
        ({"nic": [{"switch": "lan", "mac": "52:54:00:00:00:01"}] * 2}, "two cards have the MAC 52:54:00:00:00:01"),
        (
            {"nic": [{"switch": "a", "mac": "52:54:00:AA:00:01"}, {"switch": "b", "mac": "52:54:00:aa:00:01"}]},
            "two cards have the MAC 52:54:00:aa:00:01",
        ),
        ({"nic": [{"switch": "lan", "mac": "00:00:00:00:00:00"}]}, "not a unicast MAC"),
    ],
)
def test_one_fault(change: dict[str, Any], fault: str) -> None:
    message = faults({**WHOLE, **change})
    assert fault in message
    assert len(re.findall(r"(?:wrong: |; )(?:vm|boot|disk|nic)[.:[]", message)) == 1  # and nothing else


@pytest.mark.parametrize("document", [None, [], "x", 5, {"name": {}}])
def test_rubbish(document: object) -> None:
    faults(document)


@pytest.mark.parametrize("text", ["x" * 10_000, "\x1b[2J" * 2500, "\0" * 10_000, "‮" * 100, "a\nb"])
def test_hostile_texts_are_never_shown_as_they_are(text: str) -> None:
    document = {
        text: 1,
        "name": text,
        "cpus": text,
        "memory": text,
        "cpu_model": text,
        "boot": {"kernel": text, text: text},
        "disk": [{"name": text, "pool": text, "size": text, "format": text, text: text}],
        "nic": [{"switch": text, "mac": text}],
    }
    message = faults(document)
    assert len(message) < 4000
    assert message.isprintable()


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=10), st.floats()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=8,
)
KEYS = ["name", "cpus", "memory", "cpu_model", "boot", "disk", "nic", "kernel", "firmware", "pool", "size", "mac", "x"]


@given(st.dictionaries(st.sampled_from(KEYS), VALUES))
def test_any_document_is_read_or_refused(document: dict[str, Any]) -> None:
    for candidate in (document, {**WHOLE, **document}, {**WHOLE, "disk": [document], "nic": [document]}):
        try:
            found = read_definition(candidate)
        except WrongInput as error:
            assert error.code == "bad-vm"
            continue
        assert found.memory_bytes % (1 << 20) == 0
