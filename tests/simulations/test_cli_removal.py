"""`fedkd contribution` and `fedkd unlearn` as a user meets them."""

import re
from pathlib import Path

from fedkd.runs.directory import RunDirectory
from fedkd.simulations.local import run_local


def test_contribution_and_unlearning_of_a_run(fedkd, tiny) -> None:
    run = run_local(
        tiny(
            "evaluation.baselines=[oracle]",
            "teachers.models=[mlp]",
            "student.model=mlp",
            "rounds=1",
        )
    )
    code, out, err = fedkd("contribution", run.path)
    assert (code, err) == (0, "")
    assert "nothing distilled again" in out
    assert (run.path / "contribution.html").is_file()

    code, out, _ = fedkd("unlearn", run.path, "--client", 1, "--quick")
    assert code == 0
    assert "approximate; without --quick" in out
    code, out, _ = fedkd("unlearn", run.path, "--client", 1)
    assert code == 0
    assert "without client 1: exact" in out
    new = RunDirectory.open(Path(re.search(r"^run +(\S+)$", out, re.M)[1]))
    assert (new.path / "report.html").is_file()
    assert new.read_json("summary.json")["oracle"] == run.read_json("summary.json")["oracle"]
    code, out, _ = fedkd("unlearn", run.path, "--client", 1, "--quick")
    assert "exact" in out

    code, out, _ = fedkd("unlearn", run.path, "--client", 1, "--erase", "--yes")
    assert code == 0
    assert "knowledge/round-0001/transfer/client-0001" in out
    assert out.count("still knows them") == 2  # the two quick ones
    assert not list(run.path.rglob("client-0001"))
    assert run.load_checkpoint() is None
    assert new.load_checkpoint() is not None
    code, _, err = fedkd("run", "--resume", run.path)
    assert code == 2
    assert "clients were erased from this run" in err


def test_mistakes_are_one_line(fedkd, tiny) -> None:
    run = RunDirectory.new(tiny())
    for words, expected in (
        (("unlearn", run.path, "--client", 1), "has no finished round"),
        (("unlearn", run.path, "--client", 1, "--quick", "--erase"), "--erase needs the exact way"),
        (("contribution", run.path), "has no finished round"),
    ):
        code, _, err = fedkd(*words)
        assert code == 2
        assert expected in err
        assert err.count("\n") == 1
