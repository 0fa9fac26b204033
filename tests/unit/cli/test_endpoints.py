"""The client's configuration: which hosts there are, and what is said of wrong settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmferry.api import endpoints
from vmferry.api.endpoints import Endpoint, find_endpoints, read_endpoints, split_address
from vmferry.model.errors import NotFound, WrongInput


def write(directory: Path, text: str) -> Path:
    path = directory / "client.toml"
    path.write_text(text)
    return path


def test_sockets_and_addresses_are_read_in_order(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '[[host]]\nname = "a"\nsocket = "/run/a.sock"\n'
        '[[host]]\nname = "b"\naddress = "192.0.2.2:7443"\ntls_dir = "tls"\n',
    )
    expected = (
        Endpoint("a", socket=Path("/run/a.sock")),
        Endpoint("b", address="192.0.2.2:7443", tls_dir=tmp_path / "tls"),
    )
    assert read_endpoints(path) == expected


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("", "host"),
        ("host = 3", "host"),
        ("host = [3]", "host[0]"),
        ("[[hosts]]", "hosts"),
        ('[[host]]\nsocket = "/s"', "host[0].name"),
        ('[[host]]\nname = "A b"\nsocket = "/s"', "host[0].name"),
        ('[[host]]\nname = "a"', "host[0]"),
        ('[[host]]\nname = "a"\nsocket = "/s"\naddress = "b:1"', "host[0]"),
        ('[[host]]\nname = "a"\nsocket = ""', "host[0].socket"),
        ('[[host]]\nname = "a"\nsocket = 4', "host[0].socket"),
        ('[[host]]\nname = "a"\nsocket = "/s"\ntls_dir = "/t"', "host[0].tls_dir"),
        ('[[host]]\nname = "a"\nsocket = "/s"\ncolour = "red"', "host[0].colour"),
        ('[[host]]\nname = "a"\naddress = "b:1"', "host[0].tls_dir"),
        ('[[host]]\nname = "a"\naddress = "b"\ntls_dir = "/t"', "host[0].address"),
        ('[[host]]\nname = "a"\nsocket = "/s"\n[[host]]\nname = "a"\nsocket = "/t"', "host[1].name"),
        ("[[host", "not TOML"),
    ],
)
def test_a_wrong_setting_is_named_with_file_and_key(tmp_path: Path, text: str, key: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(WrongInput) as caught:
        read_endpoints(path)
    assert caught.value.code == "bad-config"
    assert caught.value.message.startswith(f"{path}: ") and key in caught.value.message


def test_a_file_that_was_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound) as caught:
        find_endpoints(None, {"VMFERRY_CONFIG": str(tmp_path / "none.toml")})
    assert caught.value.code == "no-config" and "none.toml" in caught.value.message


def test_the_order_in_which_files_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def named(name: str) -> Path:
        path = tmp_path / f"{name}.toml"
        path.write_text(f'[[host]]\nname = "{name}"\nsocket = "/s"\n')
        return path

    monkeypatch.setattr(endpoints, "SYSTEM_CONFIG", tmp_path / "system.toml")
    monkeypatch.setattr(endpoints, "LAB_CONFIG", tmp_path / "lab.toml")
    assert find_endpoints(None, {}) == (Endpoint("local", socket=Path("/run/vmferry/vmferryd.sock")),)
    named("lab")
    assert find_endpoints(None, {})[0].name == "lab"
    named("system")
    assert find_endpoints(None, {})[0].name == "system"
    environment = {"VMFERRY_CONFIG": str(named("variable"))}
    assert find_endpoints(None, environment)[0].name == "variable"
    assert find_endpoints(named("option"), environment)[0].name == "option"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.1:7443", ("10.0.0.1", 7443)),
        ("host2.example:1", ("host2.example", 1)),
        ("[fd00::1]:65535", ("fd00::1", 65535)),
    ],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert split_address(text) == expected


@pytest.mark.parametrize("text", ["", "a", ":1", "a:", "a:x", "a:0", "a:65536", "fd00::1:7443", "a:-1", "a:١"])
def test_no_addresses(text: str) -> None:
    with pytest.raises(WrongInput):
        split_address(text)
