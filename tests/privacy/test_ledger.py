"""The client's ledger: nothing past the budget, nothing forgotten, nothing changed unseen."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest

from fedkd.privacy.accounting import Steps, epsilon, noise_for
from fedkd.privacy.ledger import Account, BudgetSpent, Ledger, LedgerBroken

ACCOUNT = Account(client=3, data="a1b2", epsilon=2.0, delta=1e-5)
# Four rounds of these cost two.
ROUND = Steps(0.1, noise_for(2.0, 1e-5, 0.1, 40), 10)


def full(path: Path, rounds: int) -> Ledger:
    ledger = Ledger(path, ACCOUNT)
    for number in range(1, rounds + 1):
        ledger.reserve(number, ROUND)
        ledger.settle(number)
    return ledger


def test_the_planned_rounds_fit_exactly_and_one_more_does_not(tmp_path: Path) -> None:
    ledger = full(tmp_path / "l", 4)
    assert 1.99 < ledger.spent <= 2.0
    before = (tmp_path / "l").read_bytes()
    with pytest.raises(BudgetSpent, match="round 5 would bring client 3 to epsilon 2"):
        ledger.reserve(5, ROUND)
    assert (tmp_path / "l").read_bytes() == before
    assert ledger.paid(4)
    assert not ledger.paid(5)


def test_a_restarted_client_remembers_what_it_spent(tmp_path: Path) -> None:
    spent = full(tmp_path / "l", 3).spent
    again = Ledger(tmp_path / "l", ACCOUNT)
    assert again.spent == spent == epsilon([replace(ROUND, count=30)], 1e-5)
    again.reserve(4, ROUND)
    with pytest.raises(BudgetSpent):
        Ledger(tmp_path / "l", ACCOUNT).reserve(5, ROUND)


def test_a_round_trained_again_after_a_crash_is_paid_for_again(tmp_path: Path) -> None:
    ledger = full(tmp_path / "l", 2)
    ledger.reserve(3, ROUND)  # killed here, before its teacher was kept
    again = Ledger(tmp_path / "l", ACCOUNT)
    again.reserve(3, ROUND)
    assert again.spent == epsilon([replace(ROUND, count=40)], 1e-5)


def test_those_who_pay_at_once_do_not_overdraw_together(tmp_path: Path) -> None:
    """Each reads, decides and writes alone, whatever it had read before."""
    path = tmp_path / "l"
    ledgers = [Ledger(path, ACCOUNT) for _ in range(8)]
    together = Barrier(8)

    def pay(number: int) -> bool:
        together.wait()
        try:
            ledgers[number].reserve(number + 1, ROUND)
        except BudgetSpent:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        paid = list(threads.map(pay, range(8)))
    assert sum(paid) == 4
    last = Ledger(path, ACCOUNT)
    assert len(last.releases) == 4
    assert last.spent <= 2.0


def test_a_line_cut_off_by_a_kill_is_dropped_and_the_ledger_goes_on(tmp_path: Path) -> None:
    spent = full(tmp_path / "l", 2).spent
    with (tmp_path / "l").open("a") as file:
        file.write('{"round": 3, "reserve": {"sample_')
    again = Ledger(tmp_path / "l", ACCOUNT)
    assert again.spent == spent
    again.reserve(3, ROUND)
    assert len(Ledger(tmp_path / "l", ACCOUNT).releases) == 3


def test_killed_between_line_and_head_the_line_counts(tmp_path: Path) -> None:
    head = tmp_path / "l.head"
    path = tmp_path / "l"
    full(path, 1)
    old = head.read_bytes()
    Ledger(path, ACCOUNT).reserve(2, ROUND)
    head.write_bytes(old)
    assert len(Ledger(path, ACCOUNT).releases) == 2


@pytest.mark.parametrize("what", ["cheaper", "a line less", "two lines less", "no file", "swapped"])
def test_a_changed_ledger_is_not_used(tmp_path: Path, what: str) -> None:
    path = tmp_path / "l"
    full(path, 3)
    lines = path.read_text().splitlines(keepends=True)
    if what == "cheaper":
        line = json.loads(lines[1])
        line["reserve"]["noise_multiplier"] = 100.0
        lines[1] = json.dumps(line) + "\n"
    elif what == "a line less":
        del lines[-1]
    elif what == "two lines less":
        del lines[-2:]
    elif what == "swapped":
        lines[1], lines[3] = lines[3], lines[1]
    path.write_text("".join(lines))
    if what == "no file":
        path.unlink()
    with pytest.raises(LedgerBroken, match=str(path)):
        Ledger(path, ACCOUNT)


@pytest.mark.parametrize(
    ("key", "value"),
    [("data", "c3d4"), ("epsilon", 4.0), ("delta", 1e-4), ("accountant", "prv"), ("client", 4)],
)
def test_other_data_or_another_promise_is_refused(tmp_path: Path, key: str, value: object) -> None:
    full(tmp_path / "l", 1)
    with pytest.raises(LedgerBroken, match=f"was opened for {key}"):
        Ledger(tmp_path / "l", replace(ACCOUNT, **{key: value}))


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    full(tmp_path / "l", 1)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("l", "l.head")} == {0o600}
