"""What is drawn for people: it fits, says what is known, and is not steered by hostile names."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from recorded import CHECK, COMPLETED, HOSTILE, MIB, PROGRESS, RECEIPT, RUNNING
from rich.console import Console

from vmferry.cli.display import safe
from vmferry.cli.live import Frame, draw, span_left
from vmferry.model.migration import MigrationView, Outcome, Phase, Progress, Range

RATES = (55 * MIB, 65 * MIB)


def picture(frame: Frame, width: int = 80) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, markup=False, color_system=None).print(draw(frame, width))
    return out.getvalue().splitlines()


def test_a_frame_says_where_the_migration_stands() -> None:
    shown = picture(Frame(RUNNING, 4900, RATES, RATES))
    assert shown[0].startswith("web1  host1 → host2  m-0123456789ab  elapsed 4.9 s")
    assert shown[1].strip() == "✔ check  ✔ prepare  ▶ copy  · switchover  · handoff  · finish"
    assert re.search(r"disks .* 73% +110\.0 MiB left +60\.0 MiB/s 1\.7 s to 2\.0 s", shown[2])
    assert re.search(r"memory .* 80% +100\.0 MiB left +58\.0 MiB/s 1\.5 s to 4\.0 s", shown[3])
    assert shown[4].strip() == "dirtied 30.0 MiB/s · round 2 · throttle 20%"
    assert shown[5].strip() == "left 2.1 s to 4.8 s · blackout now 12.0 ms to 40.0 ms (goal 300 ms)"


@pytest.mark.parametrize("width", [80, 120, 200])
@pytest.mark.parametrize("view", [RUNNING, COMPLETED, replace(RUNNING, progress=Progress())])
def test_frames_fit_and_are_not_broken(view: MigrationView, width: int) -> None:
    widest = replace(
        view.progress,
        disk_total_bytes=1023 << 40,
        memory_total_bytes=1023 << 30,
        memory_remaining_bytes=1023 << 30,
        disk_rate=1023 * MIB,
    )
    for shown in (view, replace(view, progress=widest)):
        lines = picture(Frame(shown, 4900, RATES, RATES), width)
        assert len(lines) <= 6 and all(len(line) <= width for line in lines)


def test_a_phase_in_which_it_failed_is_crossed() -> None:
    failed = replace(RUNNING, outcome=Outcome.FAILED)
    assert "✘ copy" in picture(Frame(failed, 1))[1]


def test_a_finished_migration_has_nothing_left() -> None:
    shown = "\n".join(picture(Frame(COMPLETED, 9120)))
    assert "✔ finish" in shown and "blackout 17.4 ms" in shown and " left" not in shown


def test_predictions_vanish_when_they_are_over() -> None:
    progress = replace(PROGRESS, note="waiting for a quiet moment")
    finishing = replace(RUNNING, phase=Phase.FINISH, progress=progress)
    shown = "\n".join(picture(Frame(finishing, 1, RATES, RATES)))
    assert "blackout now" not in shown and "left 2.1 s" not in shown and "quiet moment" not in shown


def test_every_phase_is_drawn() -> None:
    for phase in Phase:
        assert f"▶ {phase.value}" in picture(Frame(replace(RUNNING, phase=phase, phases=()), 1))[1]


def test_time_left_is_a_range_from_what_was_seen() -> None:
    assert span_left(100, (), 0) is None
    assert span_left(100, (0,), 0) is None
    assert span_left(100, (50, 100), 0) == Range(1000, 2000)
    assert span_left(100, (50, 100), 25) == Range(1000, 4000)
    assert span_left(100, (50,), 50) == Range(2000, float("inf"))


def test_memory_that_does_not_shrink_has_no_upper_bound() -> None:
    view = replace(RUNNING, progress=replace(PROGRESS, dirty_rate=90 * MIB))
    assert "or more" in picture(Frame(view, 1, RATES, RATES))[3]


def test_hostile_text_is_escaped() -> None:
    assert safe(HOSTILE) == r"evil\x1b[2J\x9b31m[bold red]\u202ename\n"
    assert safe("Zürich – „web“ ✔ 日本") == "Zürich – „web“ ✔ 日本"
    assert safe("\ud800") == r"\ud800"


def test_hostile_names_do_not_break_a_frame() -> None:
    hostile = replace(RUNNING, vm=HOSTILE, source=HOSTILE, progress=replace(PROGRESS, note=HOSTILE))
    shown = picture(Frame(hostile, 1, notice=HOSTILE), 300)
    assert len(shown) == 8 and "[bold red]" in shown[0]
    assert all(line.isprintable() for line in shown)


def test_hostile_names_do_not_break_check_and_receipt(capsys: pytest.CaptureFixture[str]) -> None:
    from vmferry.cli.check_view import show_check
    from vmferry.cli.display import console
    from vmferry.cli.receipt_view import show_receipt

    console.cache_clear()
    finding = replace(CHECK.findings[0], message=HOSTILE, fix=HOSTILE, host=HOSTILE, code=HOSTILE)
    show_check(replace(CHECK, vm=HOSTILE, target=HOSTILE, findings=(finding,)))
    show_receipt(replace(RECEIPT, vm=HOSTILE, versions={HOSTILE: HOSTILE}), (False, HOSTILE))
    console.cache_clear()
    shown = capsys.readouterr().out
    assert shown.count("[bold red]") >= 8
    assert all(line.isprintable() for line in shown.splitlines())
