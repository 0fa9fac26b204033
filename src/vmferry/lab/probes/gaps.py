"""Finds the longest silences in a row of times. Pure; for the probes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from vmferry.lab.probes.pacing import wall_time


def find_gaps(times_ns: Sequence[int], most: int = 5) -> list[dict[str, Any]]:
    """The longest distances between neighbours, longest first."""
    pairs = ((later - earlier, earlier, later) for earlier, later in pairwise(times_ns))
    longest = sorted(pairs, reverse=True)[:most]
    return [
        {"ms": length / 1e6, "begin": wall_time(earlier), "end": wall_time(later), "begin_ns": earlier, "end_ns": later}
        for length, earlier, later in longest
    ]


def longest_ms(times_ns: Sequence[int]) -> float:
    """0 if there are less than two times."""
    return max((later - earlier for earlier, later in pairwise(times_ns)), default=0) / 1e6


def find_runs(numbers: Sequence[int], most: int = 20) -> list[tuple[int, int]]:
    """Neighbouring numbers of a sorted row as (first, how many)."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][0] + runs[-1][1]:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        elif len(runs) < most:
            runs.append((number, 1))
        else:
            break
    return runs


def count_inversions(numbers: Sequence[int]) -> int:
    """How many are smaller than one before them."""
    count, highest = 0, -1
    for number in numbers:
        if number < highest:
            count += 1
        highest = max(highest, number)
    return count
