"""What a test of a mechanism found, and how often the tests accuse a right one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

FALSE_ALARM = 1e-4
"""Chance that an audit refutes a right mechanism, shared evenly by its tests."""


@dataclass(frozen=True)
class Finding:
    """What one test found.

    Attributes:
        path: Which code was looked at.
        test: What was tested.
        over: On how much.
        expected: What the promise implies.
        seen: What was measured.
        verdict: `refuted`, `consistent`, or `no power`: no result could have refuted the claim.
        text: The verdict, in words.
    """

    path: str
    test: str
    over: str
    expected: str
    seen: str
    verdict: str
    text: str


def overall(findings: Iterable[Finding]) -> str:
    """`refuted` if one test refutes, else `consistent`."""
    return "refuted" if any(f.verdict == "refuted" for f in findings) else "consistent"
