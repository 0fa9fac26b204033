"""What goes over the wire: everything that is encoded comes back equal, and nothing else comes in."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.api.codec import decode, encode, error_from_problem, problem
from vmferry.model.errors import (
    Conflict,
    Failed,
    NotFound,
    OutcomeUnknown,
    Refused,
    Unreachable,
    VmferryError,
    WrongInput,
)
from vmferry.model.vm import DirectBoot, Disk, FirmwareBoot, Nic, RunState, VmSpec

VM = VmSpec(
    id="0b9e",
    name="web1",
    cpus=2,
    memory_bytes=1 << 29,
    machine="pc-q35-10.0",
    cpu="qemu64",
    boot=DirectBoot("kernel-1", None, "quiet"),
    disks=(Disk("root", "local", 1 << 31, "qcow2", "/p/root.qcow2"),),
    nics=(Nic("lan", "52:54:00:12:34:56"),),
)


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True, slots=True)
class Sample:
    colour: Colour
    data: bytes
    ratio: float
    counts: dict[str, int]
    pair: tuple[int, str]
    maybe: Nic | None = None


def wire(obj: object) -> Any:
    return json.loads(json.dumps(encode(obj), allow_nan=False))


@pytest.mark.parametrize("vm", [VM, replace(VM, boot=FirmwareBoot("uefi"), disks=(), nics=())])
def test_vm_comes_back_equal(vm: VmSpec) -> None:
    assert decode(VmSpec, wire(vm)) == vm


@given(
    data=st.binary(),
    ratio=st.floats(allow_nan=False, allow_infinity=False),
    counts=st.dictionaries(st.text(), st.integers(-(2**63), 2**64)),
    text=st.text(),
)
def test_every_field_comes_back_equal(data: bytes, ratio: float, counts: dict[str, int], text: str) -> None:
    sample = Sample(Colour.RED, data, ratio, counts, (3, text), None)
    assert decode(Sample, wire(sample)) == sample


def test_tuples_of_dataclasses_and_enums_decode_alone() -> None:
    assert decode(tuple[Disk, ...], wire(VM.disks)) == VM.disks
    assert decode(RunState, "running") is RunState.RUNNING


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"zork": 1}, "zork: unknown key"),
        ({"cpus": "2"}, "cpus: "),
        ({"cpus": 2.5}, "cpus: "),
        ({"cpus": True}, "cpus: "),
        ({"boot": {"firmware": "bios", "zork": 1}}, "boot.zork: unknown key"),
        ({"boot": {"kernel": "k", "initrd": None}}, "boot.cmdline: missing"),
        ({"boot": {"kernel": "k", "initrd": None, "cmdline": "", "firmware": "bios"}}, "boot.firmware: unknown key"),
        ({"disks": [{"name": "root"}]}, "disks[0].pool: missing"),
        ({"nics": [{"switch": "lan", "mac": 5}]}, "nics[0].mac: "),
    ],
)
def test_a_wrong_key_is_named_with_its_path(change: dict[str, Any], named: str) -> None:
    with pytest.raises(WrongInput) as caught:
        decode(VmSpec, wire(VM) | change)
    assert caught.value.code == "bad-document"
    assert named in caught.value.message


def test_all_wrong_keys_are_named_at_once() -> None:
    with pytest.raises(WrongInput) as caught:
        decode(VmSpec, wire(VM) | {"a": 1, "b": 2, "cpus": None})
    assert all(f"{key}: " in caught.value.message for key in ("a", "b", "cpus"))


@pytest.mark.parametrize("data", [None, [], "x", 3, float("nan"), {1: object()}])
def test_rubbish_is_wrong_input(data: object) -> None:
    with pytest.raises(WrongInput):
        decode(VmSpec, data)


@pytest.mark.parametrize("obj", [{1, 2}, float("nan"), object(), {3: 4}])
def test_what_has_no_json_form_is_a_mistake_of_ours(obj: object) -> None:
    with pytest.raises(TypeError):
        encode(obj)


@pytest.mark.parametrize("kind", [WrongInput, NotFound, Conflict, Refused, Failed, OutcomeUnknown, Unreachable])
def test_an_error_comes_back_as_its_class(kind: type[VmferryError]) -> None:
    again = error_from_problem(json.loads(json.dumps(problem(kind("some-code", "It happened.", "Do this.")))))
    assert type(again) is kind
    assert (again.code, again.message, again.fix) == ("some-code", "It happened.", "Do this.")


def test_a_subclass_from_elsewhere_comes_back_as_its_family() -> None:
    class Special(Conflict):
        pass

    assert type(error_from_problem(problem(Special("x", "y")))) is Conflict


@pytest.mark.parametrize("document", [None, [], "no", {}, {"status": "x", "code": 3}, {"kind": "object"}])
def test_any_answer_becomes_an_error(document: object) -> None:
    assert isinstance(error_from_problem(document), VmferryError)


def test_a_stranger_s_problem_is_judged_by_its_status() -> None:
    assert type(error_from_problem({"status": 404, "title": "Gone"})) is NotFound
    assert error_from_problem({"status": 404, "title": "Gone"}).message == "Gone"


def test_importing_the_codec_does_not_load_pydantic() -> None:
    script = "import vmferry.api.codec, sys; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
