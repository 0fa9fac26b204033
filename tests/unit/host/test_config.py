"""vmferryd.toml: what is left out has a default, and every fault is named at once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vmferry.host.config import DEFAULT_PORT, HostConfig, PeerConfig, PoolConfig, load_config, parse_config
from vmferry.model.errors import NotFound, WrongInput

EXAMPLE = Path(__file__).parents[3] / "packaging" / "vmferryd.toml"
SMALLEST = '[host]\nname = "host1"\n'


def faults_of(text: str) -> list[str]:
    with pytest.raises(WrongInput) as caught:
        parse_config(text, "/etc/x.toml")
    assert caught.value.code == "bad-config"
    lines = caught.value.message.splitlines()
    assert all(line.startswith("/etc/x.toml: ") for line in lines)
    return lines


def test_a_name_is_enough() -> None:
    config = parse_config(SMALLEST)
    assert config.state_dir == Path("/var/lib/vmferry")
    assert config.tls_dir == Path("/var/lib/vmferry/tls")
    assert config.socket_path == Path("/run/vmferry/vmferryd.sock")
    assert (config.pools, config.switches, config.peers) == ((), (), ())
    assert config.migration.address == ""
    assert config.limits.memory_reserve_bytes == 512 << 20
    assert config.limits.switchover_limit_ms == 1000


def test_the_shipped_example_is_valid() -> None:
    config = load_config(EXAMPLE)
    assert config.pools[0] == PoolConfig("local", "directory", Path("/var/lib/vmferry/pools/local"))


def test_the_shipped_example_shows_every_key_with_its_default() -> None:
    text = EXAMPLE.read_text()
    uncommented = re.sub(r"(?m)^# (\w+ = )", r"\1", text)
    full = parse_config(uncommented)
    plain = parse_config(text)
    assert full.peers == (PeerConfig("host2", "192.0.2.2", 7443),)
    for name in HostConfig.__slots__:
        if name != "peers":
            assert getattr(full, name) == getattr(plain, name), name
    for table in (full.migration, full.limits, full.switches[0], full.pools[0], full):
        for key in type(table).__slots__:
            stem = re.sub(r"(_bytes|_ms|_bps)$", "", key)
            if stem not in ("pools", "switches", "migration", "limits", "peers", "tls_dir"):
                assert re.search(rf"(?m)^(# )?{stem} = ", text), key


def test_everything_that_is_wrong_is_named_at_once() -> None:
    lines = faults_of(
        """
        [host]
        nmae = "host1"
        accel = "xen"
        state_dir = "relative"
        [limits]
        memory_reserve = "lots"
        incoming = -1
        prepare_timeout = 5
        [migration]
        address = "host1.example"
        tls = "yes"
        port = 70000
        [[pool]]
        name = "Local"
        path = "/p"
        [[pool]]
        name = "b"
        [[switch]]
        name = "lan"
        device = "a-name-that-is-too-long"
        uplinks = "eth0"
        [peer]
        [peers]
        host2 = "192.0.2.2:port"
        """
    )
    text = "\n".join(lines)
    for expected in (
        "[host] nmae is not a known key; did you mean name?",
        "[host] name is missing; give a name",
        '[host] accel = "xen" is found; allowed is one of "auto", "kvm", "tcg".',
        '[host] state_dir = "relative" is found; allowed is an absolute path',
        '[limits] memory_reserve = "lots" is found; allowed is a size such as "512MiB".',
        "[limits] incoming = -1 is found; allowed is a whole number from 0 to 1000.",
        "[limits] prepare_timeout = 5 is found; allowed is a duration",
        '[migration] address = "host1.example"',
        '[migration] tls = "yes" is found; allowed is true or false.',
        "[migration] port = 70000",
        '[[pool]] number 1 name = "Local"',
        "[[pool]] number 2 path is missing",
        '[[switch]] number 1 device = "a-name',
        '[[switch]] number 1 uplinks = "eth0" is found; allowed is a list',
        "top level peer is not a known key; did you mean peers?",
        '[peers] host2 = "192.0.2.2:port"',
    ):
        assert expected in text, expected
    assert len(lines) == 16


def test_doubles_are_faults() -> None:
    lines = faults_of(SMALLEST + '[[pool]]\nname = "a"\npath = "/p"\n[[pool]]\nname = "a"\npath = "/p"\n')
    assert len(lines) == 2


@pytest.mark.parametrize("text", ["x = ", "host = 3", "pool = 3", "[pool]", "peers = 3", SMALLEST + "[peers]\nUP = 3"])
def test_wrong_shapes_are_faults(text: str) -> None:
    assert faults_of(text)


@pytest.mark.parametrize(
    ("text", "address", "port"),
    [
        ("192.0.2.2:9", "192.0.2.2", 9),
        ("192.0.2.2", "192.0.2.2", DEFAULT_PORT),
        ("[2001:db8::2]:9", "2001:db8::2", 9),
        ("[2001:db8::2]", "2001:db8::2", DEFAULT_PORT),
        ("host2.example:9", "host2.example", 9),
    ],
)
def test_peers(text: str, address: str, port: int) -> None:
    assert parse_config(f'{SMALLEST}[peers]\nhost2 = "{text}"').peers == (PeerConfig("host2", address, port),)


@pytest.mark.parametrize("text", ["", ":9", "a:0", "a:99999", "[::1", "[x]:3", "a b:3", "::1"])
def test_wrong_peers(text: str) -> None:
    assert len(faults_of(f'{SMALLEST}[peers]\nhost2 = "{text}"')) == 1


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no configuration file"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(WrongInput, match="cannot be read"):
        load_config(tmp_path)
