"""Commands as processes: what they ask, print and exit with (interface.md)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from recorded import (
    CHECK,
    COMPLETED,
    HOST,
    HOSTILE,
    ID,
    RECEIPT,
    REFUSED_CHECK,
    RUNNING,
    VM,
    RecordedHost,
)

from vmferry.api.codec import encode
from vmferry.model.errors import Conflict, Failed, NotFound, OutcomeUnknown
from vmferry.model.migration import MigrationView, Outcome, Phase, Reason, Role

Hosts = list[RecordedHost]


def owning(host: RecordedHost) -> RecordedHost:
    return host.on("GET", "/v1/vms/web1", VM).on("GET", "/v1/vms", [VM])


def migrating(host: RecordedHost, last: MigrationView) -> RecordedHost:
    begun = replace(RUNNING, phase=Phase.CHECK, phases=RUNNING.phases[:1])
    owning(host).on("POST", "/v1/vms/web1/migrate", begun).on("GET", f"/v1/migrations/{ID}", RUNNING)
    host.on("GET", f"/v1/migrations/{ID}/events", iter([RUNNING, last]))
    return host.on("GET", f"/v1/migrations/{ID}/receipt", RECEIPT).on("GET", f"/v1/migrations/{ID}/check", CHECK)


def ended(outcome: Outcome, code: str = "", fix: str = "") -> MigrationView:
    reason = Reason(code, f"This is why: {code}.", fix) if code else None
    return replace(RUNNING, outcome=outcome, reason=reason)


def test_lists_are_of_all_hosts_and_silent_ones_are_said(hosts: Hosts, run: Run, tmp_path: Path) -> None:
    owning(hosts[0])
    hosts[1].on("GET", "/v1/vms", [replace(VM, spec=replace(VM.spec, name="db1", id="other"), host="host2")])
    done = run("vm", "list", "--json", "--config", str(tmp_path / "three.toml"))
    assert (done.status, [view["spec"]["name"] for view in done.document]) == (0, ["db1", "web1"])
    assert "host3" in done.err and "No daemon answers" in done.err
    shown = run("vm", "list")
    assert "web1" in shown.out and "db1" in shown.out and shown.err == ""
    narrowed = run("vm", "list", "--host", "host2", "--json")
    assert [view["host"] for view in narrowed.document] == ["host2"]


def test_an_empty_list_is_an_error_while_a_host_is_silent(hosts: Hosts, run: Run, tmp_path: Path) -> None:
    for host in hosts:
        host.on("GET", "/v1/vms", [])
    assert run("vm", "list", "--json").out.strip() == "[]"
    done = run("vm", "list", "--json", "--config", str(tmp_path / "three.toml"))
    assert done.status == 1 and "host3" in done.err


def test_a_list_without_any_answer_is_an_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "client.toml").write_text(f'[[host]]\nname = "host9"\nsocket = "{tmp_path}/none.sock"\n')
    done = run("vm", "list", "--json")
    assert done.status == 1
    assert done.document["error"]["code"] == "daemon-not-running"
    assert "systemctl start vmferryd" in done.err


def test_the_owner_is_asked(hosts: Hosts, run: Run) -> None:
    owning(hosts[1]).on("POST", "/v1/vms/web1/stop", VM)
    done = run("vm", "stop", "web1", "--timeout", "2m", "--json")
    assert (done.status, done.document) == (0, encode(VM))
    assert hosts[1].asked[-1] == ("POST", "/v1/vms/web1/stop", {"timeout_ms": 120_000})
    assert all(method == "GET" for method, _, _ in hosts[0].asked)


@pytest.mark.parametrize("act", ["start", "kill", "pause", "resume"])
def test_acts(hosts: Hosts, run: Run, act: str) -> None:
    owning(hosts[0]).on("POST", f"/v1/vms/web1/{act}", VM)
    done = run("vm", act, "web1")
    assert (done.status, done.err) == (0, "") and done.out.startswith("web1 is ")


def test_nobody_has_the_vm(hosts: Hosts, run: Run, tmp_path: Path) -> None:
    done = run("vm", "show", "web1", "--json")
    assert (done.status, done.document["error"]["code"]) == (2, "no-such-vm")
    assert "host1, host2" in done.err
    done = run("vm", "show", "web1", "--json", "--config", str(tmp_path / "three.toml"))
    assert (done.status, done.document["error"]["code"]) == (1, "owner-not-found")
    assert "host3 could not be asked" in done.err


def test_two_hosts_claim_the_vm(hosts: Hosts, run: Run) -> None:
    owning(hosts[0])
    hosts[1].on("GET", "/v1/vms/web1", replace(VM, host="host2"))
    done = run("vm", "start", "web1", "--json")
    assert (done.status, done.document["error"]["code"]) == (1, "claimed-twice")
    assert "host1 and host2" in done.err and "--host" in done.err
    assert run("vm", "show", "web1", "--json", "--host", "host2").document["host"] == "host2"


def test_the_newer_generation_owns_the_vm(hosts: Hosts, run: Run) -> None:
    moved = replace(VM, host="host2", spec=replace(VM.spec, generation=2))
    owning(hosts[0])
    hosts[1].on("GET", "/v1/vms/web1", moved).on("GET", "/v1/vms", [moved]).on("POST", "/v1/vms/web1/pause", moved)
    assert run("vm", "show", "web1", "--json").document["host"] == "host2"
    assert [view["host"] for view in run("vm", "list", "--json").document] == ["host2"]
    assert run("vm", "pause", "web1").out == "web1 is paused on host2 (now running)\n"


def test_what_a_host_refuses_is_said_with_its_fix(hosts: Hosts, run: Run) -> None:
    refusal = Conflict("vm-running", "web1 is running.", "Stop it first: vmferry vm stop web1.")
    owning(hosts[0]).on("DELETE", "/v1/vms/web1", refusal)
    done = run("vm", "delete", "web1")
    assert (done.status, done.out) == (1, "")
    assert done.err == "error: web1 is running.\n  fix: Stop it first: vmferry vm stop web1.\n"


def test_create_sends_the_specification(hosts: Hosts, run: Run, tmp_path: Path) -> None:
    (tmp_path / "web1.toml").write_text('name = "web1"\ncpus = 2\n[boot]\nkernel = "vmlinuz"\n')
    hosts[0].on("POST", "/v1/vms", VM)
    done = run("vm", "create", "-f", str(tmp_path / "web1.toml"), "--host", "host1", "--json")
    assert (done.status, done.document) == (0, encode(VM))
    spec = {"name": "web1", "cpus": 2, "boot": {"kernel": str(tmp_path / "vmlinuz")}}
    assert hosts[0].asked == [("POST", "/v1/vms", {"spec": spec})]


def test_a_check_that_passes(hosts: Hosts, run: Run) -> None:
    owning(hosts[0]).on("POST", "/v1/vms/web1/check", CHECK)
    done = run("vm", "check", "web1", "--to", "host2", "--storage", "fast", "--bandwidth", "500mbit")
    assert done.status == 0
    for piece in ("✔ cpu-features", "! clock-differs", "fix: Run an NTP client.", "8.2 s to 11.4 s", "can move"):
        assert piece in done.out
    _, _, body = hosts[0].asked[-1]
    assert body["to"] == "host2"
    assert (body["options"]["storage"], body["options"]["bandwidth_bps"]) == ({"": "fast"}, 500_000_000)


def test_a_check_that_refuses(hosts: Hosts, run: Run) -> None:
    owning(hosts[0]).on("POST", "/v1/vms/web1/check", REFUSED_CHECK)
    done = run("vm", "check", "web1", "--to", "host2")
    assert done.status == 3 and "✘ switch-missing" in done.out and "cannot move" in done.out
    done = run("vm", "migrate", "web1", "--to", "host2", "--dry-run", "--json")
    assert (done.status, done.document) == (3, encode(REFUSED_CHECK))
    assert not any(path.endswith("/migrate") for _, path, _ in hosts[0].asked)


def test_a_migration_that_completes(hosts: Hosts, run: Run) -> None:
    migrating(hosts[0], COMPLETED)
    done = run("vm", "migrate", "web1", "--to", "host2")
    assert (done.status, done.err) == (0, "")
    phases = [line.split()[-1] for line in done.out.splitlines() if ID in line]
    assert phases == ["check", "prepare", "copy", "switchover", "handoff", "finish"]
    for piece in ("pause", "17.4 ms", "9.1 s", "548.0 MiB in 4 rounds", "0 lost", "✔ equal", "after: yes"):
        assert piece in done.out


def test_a_pause_that_nobody_measured_is_no_pause_of_zero(hosts: Hosts, run: Run) -> None:
    """The answer was lost, or the daemon restarted meanwhile."""
    migrating(hosts[0], COMPLETED).on("GET", f"/v1/migrations/{ID}/receipt", replace(RECEIPT, blackout_ms=None))
    done = run("vm", "migrate", "web1", "--to", "host2")
    assert (done.status, done.err) == (0, "") and "not measured" in done.out


def test_a_migration_as_json_lines(hosts: Hosts, run: Run) -> None:
    migrating(hosts[0], COMPLETED)
    done = run("vm", "migrate", "web1", "--to", "host2", "--json")
    assert done.status == 0
    assert done.lines[-1] == encode(COMPLETED) and all(line["id"] == ID for line in done.lines)


@pytest.mark.parametrize(
    ("last", "status", "code"),
    [
        (ended(Outcome.FAILED, "target-died", "Look at its log."), 1, "target-died"),
        (ended(Outcome.FAILED), 1, "failed"),
        (ended(Outcome.CANCELLED, "cancelled"), 1, "cancelled"),
        (ended(Outcome.FAILED, "refused"), 3, "refused"),
        (ended(Outcome.UNKNOWN, "peer-silent"), 4, "peer-silent"),
    ],
)
def test_how_a_migration_ended_is_the_exit_status(
    hosts: Hosts, run: Run, last: MigrationView, status: int, code: str
) -> None:
    migrating(hosts[0], last)
    done = run("vm", "migrate", "web1", "--to", "host2", "--json")
    assert done.status == status
    assert done.lines[-2] == encode(last)
    assert done.lines[-1]["error"]["code"] == code
    assert done.err.startswith("error: ")
    assert ("check" in done.lines[-1]["error"]) == (status == 3)
    if status == 4:
        assert f"vmferry migration recover {ID}" in done.err


def test_a_refused_migration_shows_what_the_check_found(hosts: Hosts, run: Run) -> None:
    migrating(hosts[0], ended(Outcome.FAILED, "refused")).on("GET", f"/v1/migrations/{ID}/check", REFUSED_CHECK)
    done = run("vm", "migrate", "web1", "--to", "host2")
    assert done.status == 3 and "✘ switch-missing" in done.out


def test_an_answer_that_was_lost_is_not_called_a_failure(hosts: Hosts, run: Run) -> None:
    owning(hosts[0]).on("POST", "/v1/vms/web1/migrate", b"{")
    assert run("vm", "migrate", "web1", "--to", "host2").status == 4
    hosts[0].on("POST", "/v1/vms/web1/migrate", OutcomeUnknown("lost", "Who knows?", "Look."))
    assert run("vm", "migrate", "web1", "--to", "host2").status == 4
    hosts[0].on("POST", "/v1/vms/web1/migrate", Failed("no", "No.", ""))
    assert run("vm", "migrate", "web1", "--to", "host2").status == 1


def test_detached(hosts: Hosts, run: Run) -> None:
    migrating(hosts[0], COMPLETED)
    done = run("vm", "migrate", "web1", "--to", "host2", "--detach")
    assert (done.status, done.out) == (0, f"{ID}\n")
    assert run("vm", "migrate", "web1", "--to", "host2", "--detach", "--json").document["id"] == ID


def test_watching_survives_a_stream_that_breaks_off(hosts: Hosts, run: Run) -> None:
    def broken() -> Any:
        yield RUNNING
        hosts[0].on("GET", f"/v1/migrations/{ID}", COMPLETED)
        raise ConnectionResetError

    migrating(hosts[0], COMPLETED).on("GET", f"/v1/migrations/{ID}/events", broken())
    done = run("migration", "watch", ID, "--json")
    assert done.status == 0 and done.lines[-1]["outcome"] == "completed"


def test_interrupting_the_watching_leaves_the_migration_alone(hosts: Hosts, tmp_path: Path) -> None:
    def endless() -> Any:
        while True:
            yield RUNNING

    migrating(hosts[0], COMPLETED).on("GET", f"/v1/migrations/{ID}/events", endless())
    argv = [sys.executable, "-m", "vmferry.cli.main", "vm", "migrate", "web1", "--to", "host2", "--json"]
    environment = {**os.environ, "VMFERRY_CONFIG": str(tmp_path / "client.toml")}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as watching:
        assert watching.stdout is not None
        assert json.loads(watching.stdout.readline())["id"] == ID
        assert json.loads(watching.stdout.readline())["id"] == ID
        watching.send_signal(signal.SIGINT)
        _, said = watching.communicate(timeout=30)
    assert watching.returncode == 130
    assert f"vmferry migration watch {ID}" in said and f"vmferry migration cancel {ID}" in said
    assert not any(path.endswith("/cancel") for _, path, _ in hosts[0].asked)


def test_a_reader_that_leaves_only_ends_the_watching(hosts: Hosts, tmp_path: Path) -> None:
    def endless() -> Any:
        while True:
            yield RUNNING

    migrating(hosts[0], COMPLETED).on("GET", f"/v1/migrations/{ID}/events", endless())
    argv = [sys.executable, "-m", "vmferry.cli.main", "migration", "watch", ID, "--json"]
    environment = {**os.environ, "VMFERRY_CONFIG": str(tmp_path / "client.toml")}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as watching:
        assert watching.stdout is not None and watching.stderr is not None
        watching.stdout.readline()
        watching.stdout.close()
        said = watching.stderr.read()
        assert watching.wait(30) == 130
    assert "Traceback" not in said


def test_the_source_is_asked_about_a_migration(hosts: Hosts, run: Run) -> None:
    hosts[0].on("GET", f"/v1/migrations/{ID}", replace(RUNNING, role=Role.TARGET))
    hosts[1].on("GET", f"/v1/migrations/{ID}", RUNNING)
    hosts[1].on("POST", f"/v1/migrations/{ID}/cancel", ended(Outcome.CANCELLED))
    done = run("migration", "cancel", ID)
    assert (done.status, done.out) == (0, f"{ID} is cancelled; web1 runs on host1\n")


@pytest.mark.parametrize(
    ("outcome", "status"), [(Outcome.COMPLETED, 0), (Outcome.FAILED, 1), (Outcome.UNKNOWN, 4), (Outcome.RUNNING, 0)]
)
def test_recover(hosts: Hosts, run: Run, outcome: Outcome, status: int) -> None:
    unknown = ended(Outcome.UNKNOWN, "peer-silent")
    hosts[0].on("GET", f"/v1/migrations/{ID}", unknown)
    hosts[0].on("POST", f"/v1/migrations/{ID}/recover", ended(outcome))
    done = run("migration", "recover", ID, "--host-is-dead", "host2", "--json")
    assert (done.status, done.document["outcome"]) == (status, outcome.value)
    assert hosts[0].asked[-1][2] == {"host_is_dead": "host2"}


def test_a_settled_migration_needs_no_recovery(hosts: Hosts, run: Run) -> None:
    hosts[0].on("GET", f"/v1/migrations/{ID}", COMPLETED)
    assert run("migration", "recover", ID).status == 0
    assert all(method == "GET" for method, _, _ in hosts[0].asked)


def test_migrations_are_listed_once(hosts: Hosts, run: Run) -> None:
    hosts[0].on("GET", "/v1/migrations", [replace(COMPLETED, role=Role.TARGET, vm_id="x")])
    hosts[1].on("GET", "/v1/migrations", [replace(RUNNING, id="m-1", started_at="2027"), COMPLETED])
    done = run("migration", "list", "--json")
    assert [(view["id"], view["role"]) for view in done.document] == [("m-1", "source"), (ID, "source")]
    assert ID in run("migration", "list").out


@pytest.mark.parametrize(
    ("view", "why", "fix"),
    [
        (RUNNING, "is under way", "watch"),
        (ended(Outcome.FAILED, "link-lost"), "ended otherwise: failed. Only a completed", "show"),
        (ended(Outcome.UNKNOWN, "peer-silent"), "has not ended: its outcome is unknown. Only a completed", "recover"),
        (COMPLETED, "is completed, but no host that answered has a receipt", "show"),
    ],
)
def test_without_a_receipt_it_is_said_why(hosts: Hosts, run: Run, view: MigrationView, why: str, fix: str) -> None:
    missing = NotFound("no-document", "Migration has no receipt document.", "Did it get that far?")
    hosts[0].on("GET", f"/v1/migrations/{ID}", view).on("GET", f"/v1/migrations/{ID}/receipt", missing)
    done = run("migration", "receipt", ID)
    assert done.status == 2 and why in " ".join(done.err.split())
    assert f"vmferry migration {fix} {ID}" in " ".join(done.err.split())


def test_a_receipt_and_its_signature(hosts: Hosts, run: Run) -> None:
    hosts[0].on("GET", f"/v1/migrations/{ID}", COMPLETED).on("GET", f"/v1/migrations/{ID}/receipt", RECEIPT)
    hosts[0].on("POST", f"/v1/migrations/{ID}/receipt/check", {"valid": True, "reason": ""})
    done = run("migration", "receipt", ID)
    assert done.status == 0 and "signature  valid" in " ".join(done.out.split(" ")).replace("   ", "  ")
    assert run("migration", "receipt", ID, "--json").document == encode(RECEIPT)
    hosts[0].on("POST", f"/v1/migrations/{ID}/receipt/check", {"valid": False, "reason": "changed"})
    done = run("migration", "receipt", ID)
    assert done.status == 1 and "NOT VALID: changed" in done.out


def test_hosts_and_peers(hosts: Hosts, run: Run, tmp_path: Path) -> None:
    for host in hosts[:2]:
        host.on("GET", "/v1/host", replace(HOST, name=host.name))
    hosts[0].on("GET", "/v1/hosts", [HOST, replace(HOST, name="host4", reachable=False, problem="No answer.")])
    done = run("host", "list", "--json", "--config", str(tmp_path / "three.toml"))
    assert [(view["name"], view["reachable"]) for view in done.document] == [
        ("host1", True),
        ("host2", True),
        ("host3", False),
        ("host4", False),
    ]
    shown = run("host", "list").out
    assert "unreachable" in shown and "host4: No answer." in shown
    assert "br-lan" in run("host", "show", "host2").out
    assert run("host", "show", "host7").status == 2


def test_host_verbs_speak_to_one_host(hosts: Hosts, run: Run) -> None:
    hosts[1].on("POST", "/v1/host/probe", HOST).on("PUT", "/v1/peers/host3", {})
    hosts[1].on("POST", "/v1/tokens", {"token": "vmferry1-abc", "expires_at": "2026-11-23T11:00:00Z"})
    assert run("host", "probe", "host2").status == 0
    assert run("host", "probe").status == 2
    assert run("host", "token", "--host", "host2").out == "vmferry1-abc\n"
    assert run("host", "add", "host3", "192.0.2.3:7443", "--host", "host2").status == 0
    assert hosts[1].asked[-1] == ("PUT", "/v1/peers/host3", {"address": "192.0.2.3:7443"})
    assert run("host", "add", "host3", "192.0.2.3").status == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("vm", "lost"),
        ("vm", "show"),
        ("vm", "migrate", "web1"),
        ("vm", "migrate", "web1", "--to", "host2", "--mode", "cold"),
        ("vm", "migrate", "web1", "--to", "host2", "--max-slowdown", "150%"),
        ("vm", "migrate", "web1", "--to", "host2", "--max-blackout", "soon"),
        ("vm", "list", "--host", "host9"),
        ("vm", "show", "../../etc/passwd"),
        ("vm", "list", "--config", "/nonexistent.toml"),
    ],
)
def test_wrong_usage(hosts: Hosts, run: Run, arguments: tuple[str, ...]) -> None:
    done = run(*arguments, "--json")
    assert done.status == 2
    assert set(done.document) == {"error"} and "error: " in done.err
    assert "Traceback" not in done.err


def test_hostile_names_stay_text(hosts: Hosts, run: Run) -> None:
    hostile = replace(VM, spec=replace(VM.spec, name=HOSTILE), problem=HOSTILE)
    hosts[0].on("GET", "/v1/vms", [hostile])
    hosts[1].on("GET", "/v1/vms", Failed("x", HOSTILE, HOSTILE))
    done = run("vm", "list")
    assert done.status == 0
    assert all(line.isprintable() for line in (done.out + done.err).splitlines())
    assert "[bold red]" in done.out and "[bold red]" in done.err
    assert run("vm", "list", "--json").out.isascii()


def test_a_terminal_without_utf8(hosts: Hosts, run: Run) -> None:
    owning(hosts[0]).on("POST", "/v1/vms/web1/check", CHECK)
    done = run("vm", "check", "web1", "--to", "host2", PYTHONIOENCODING="latin-1", PYTHONUTF8="0")
    assert done.status == 0 and "host1 -> host2" in done.out and "+ cpu-features" in done.out


def all_commands() -> list[tuple[str, ...]]:
    import click

    from vmferry.cli.main import root

    context = click.Context(root)
    found: list[tuple[str, ...]] = []
    for noun in root.list_commands(context):
        group = root.get_command(context, noun)
        assert isinstance(group, click.Group)
        found += [(noun, verb) for verb in group.commands]
    return found


@pytest.mark.parametrize("command", all_commands(), ids=" ".join)
def test_every_command_has_json_and_an_example(command: tuple[str, str]) -> None:
    import click

    from vmferry.cli.main import root

    context = click.Context(root)
    group = root.get_command(context, command[0])
    assert isinstance(group, click.Group)
    verb = group.commands[command[1]]
    text = verb.get_help(click.Context(verb, info_name=command[1]))
    assert "--json" in text and "Example:" in text and f"vmferry {command[0]} {command[1]}" in text


def test_completion(hosts: Hosts, run: Run) -> None:
    owning(hosts[0])
    hosts[1].on("GET", "/v1/vms", [replace(VM, spec=replace(VM.spec, name="web2;rm")), replace(VM, host="host2")])
    hosts[0].on("GET", "/v1/migrations", [RUNNING])

    def complete(*words: str) -> list[str]:
        line = " ".join(("vmferry", *words))
        environment = {"_VMFERRY_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words))}
        return run(**environment).out.split()

    assert complete("vm", "show", "w") == ["plain,web1"]
    assert complete("migration", "watch", "m") == [f"plain,{ID}"]
    assert complete("vm", "migrate", "web1", "--to", "h") == ["plain,host1", "plain,host2"]
    assert complete("vm", "mi") == ["plain,migrate"]


def test_completion_is_silent_without_hosts(run: Run, tmp_path: Path) -> None:
    environment = {"_VMFERRY_COMPLETE": "bash_complete", "COMP_WORDS": "vmferry vm show w", "COMP_CWORD": "3"}
    done = run(**environment)
    assert (done.out.strip(), done.err) == ("", "")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_scripts(run: Run, shell: str) -> None:
    done = run("completion", shell)
    assert done.status == 0 and f"_VMFERRY_COMPLETE={shell}_complete" in done.out


def test_start_imports_nothing_heavy() -> None:
    heavy = ("pydantic", "rich", "aiohttp", "cryptography", "http", "ssl", "asyncio")
    code = f"import sys, vmferry.cli.main, vmferry.cli.vm; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
