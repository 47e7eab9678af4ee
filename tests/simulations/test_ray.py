"""The main job: Flower's simulation runtime on Ray, with real processes and real faults."""

import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedkd.config import ConfigError
from fedkd.reporting.run_page import write_report
from fedkd.runs.events import AnswersReleased, ReplyRefused, RoundFinished
from fedkd.simulations.client_app import make_client_app
from fedkd.simulations.local import run_local
from fedkd.simulations.ray import run_ray
from tests.conftest import Tiny
from tests.simulations.faults import BAD_PAYLOADS, killed_once, slow, tampering
from tests.simulations.ray_processes import nothing_left_behind, student  # noqa: F401


def test_every_bad_payload_in_one_real_run(tiny: Tiny) -> None:
    """One client per fault beside two honest ones: the run ends well and names each."""
    tampers = {client: BAD_PAYLOADS[name][0] for client, name in enumerate(BAD_PAYLOADS)}
    clients = len(tampers) + 2
    run = run_ray(
        tiny(
            f"clients={clients}", "federation.codec=float32", "federation.quorum=0.25",
            "data.partition=iid", "evaluation.baselines=[]",
        ),
        client_app=tampering(tampers),
    )  # fmt: skip
    honest = [len(tampers), len(tampers) + 1]
    for number in (1, 2):
        refused = {r.client: r.reason for r in run.events(ReplyRefused) if r.round == number}
        assert set(refused) == set(tampers)
        for client, name in enumerate(BAD_PAYLOADS):
            assert BAD_PAYLOADS[name][1] in refused[client]
        assert run.events(RoundFinished)[number - 1].answered == honest
        assert run.events(RoundFinished)[number - 1].status == "ok"
    page = write_report(run).read_text(encoding="utf-8")
    assert "replayed or late" in page


def test_it_is_the_student_of_the_local_runner_and_a_killed_worker_costs_nothing(
    lean: None, tiny: Tiny, tmp_path: Path
) -> None:
    flag = tmp_path / "killed"
    few = ("resources.client_cpus=2", "evaluation.baselines=[oracle]")
    on_ray = run_ray(tiny(*few), client_app=killed_once(flag))
    assert flag.exists()
    assert [r.answered for r in on_ray.events(RoundFinished)] == [[0, 1, 2], [0, 1, 2]]
    in_process = run_local(tiny(*few))
    ours, theirs = (run.read_json("summary.json") for run in (on_ray, in_process))
    for key in ("hash", "student", "teachers", "ensemble", "oracle"):
        assert ours[key] == theirs[key]
    sent = theirs["bytes"]["knowledge"]["up"]
    assert ours["bytes"]["knowledge"]["up"] == pytest.approx(sent, rel=0.02)


@pytest.mark.slow
def test_votes_about_cells_are_those_of_the_local_runner(tiny: Tiny) -> None:
    """With so much to spend that their noise changes no label."""
    words = (
        "release={name: gnmax, epsilon: 1.0e+4, min_votes: 3, cells: 6}", "fusion=[uniform]",
        "distillation.losses=[ce]", "evaluation.teachers=false", "evaluation.clients=false",
        "evaluation.baselines=[oracle]",
    )  # fmt: skip
    on_ray, in_process = run_ray(tiny(*words)), run_local(tiny(*words))
    assert on_ray.read_json("summary.json")["hash"] == in_process.read_json("summary.json")["hash"]
    events = on_ray.events(AnswersReleased)
    assert [(event.answered, event.cells) for event in events] == [(48, 6), (48, 6)]


@pytest.mark.slow
def test_a_group_whose_worker_is_killed_is_trained_by_another(tiny: Tiny, tmp_path: Path) -> None:
    flag = tmp_path / "killed"
    words = ("clients=6", "resources.batch_clients=on", "teachers.optimizer={name: sgd}")
    on_ray = run_ray(tiny(*words), client_app=killed_once(flag))
    assert flag.exists()
    assert [r.answered for r in on_ray.events(RoundFinished)] == [[*range(6)], [*range(6)]]
    in_process = run_local(tiny(*words))
    ours, theirs = (run.read_json("summary.json")["teachers"] for run in (on_ray, in_process))
    for one, other in zip(ours, theirs, strict=True):
        assert one["accuracy"] == pytest.approx(other["accuracy"], abs=0.05)


def on_which_machine(folder: Path) -> ClientApp:
    """The real client app, whose workers note on which of Ray's nodes they are."""
    place = str(folder)

    def mod(message: Message, context: Context, call_next: Any) -> Message:
        import ray

        node = ray.get_runtime_context().get_node_id()
        (Path(place) / node).touch()
        time.sleep(0.2)  # so that no worker answers everybody
        reply: Message = call_next(message, context)
        return reply

    return make_client_app([mod])


@pytest.mark.slow
def test_a_cluster_of_two_nodes_is_used_and_left_alone(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        # The file that names the machine's cluster is not where other runs look.
        monkeypatch.setenv("RAY_TMPDIR", short)
        cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
        )
        try:
            cluster.add_node(num_cpus=1, include_dashboard=False)
            nodes = tmp_path / "nodes"
            nodes.mkdir()
            words = ("clients=4", f"resources.ray_address={cluster.address}")
            run = run_ray(tiny(*words), client_app=on_which_machine(nodes))
            assert len(list(nodes.iterdir())) == 2
            assert not ray.is_initialized()
            assert all(not node.dead_processes() for node in cluster.list_all_nodes())
            with pytest.raises(ConfigError, match="client_cpus: 2 asked for each client, but Ray"):
                run_ray(tiny(*words, "resources.client_cpus=2"))
        finally:
            cluster.shutdown()
    assert student(run) == student(run_local(tiny("clients=4")))
    with pytest.raises(RuntimeError, match="no Ray cluster could be joined at '127"):
        run_ray(tiny("resources.ray_address=127.0.0.1:1"))


@pytest.mark.slow
def test_a_late_client_loses_its_round_and_takes_part_again(tiny: Tiny) -> None:
    run = run_ray(tiny("federation.deadline=20"), client_app=slow(client=1, seconds=30))
    refused = run.events(ReplyRefused)
    assert [(r.round, r.client, r.phase) for r in refused] == [(1, 1, "train")]
    first, second = run.events(RoundFinished)
    assert first.answered == [0, 2]
    assert second.answered == [0, 1, 2]
