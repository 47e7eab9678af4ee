"""Teachers of several domains, an unlabelled target: the split, a run, its table, refusals."""

from pathlib import Path

import pytest
import torch

from fedkd.build import build_data, check
from fedkd.config import ConfigError
from fedkd.data.datasets import load_dataset
from fedkd.data.domains import Domains, Shift, coloured, shifted
from fedkd.data.splits import federate
from fedkd.knowledge.query import Images
from fedkd.reporting.run_cards import domains_card
from fedkd.reporting.run_record import Found
from fedkd.rounds import ExperimentContext
from fedkd.runs.directory import RunDirectory
from fedkd.runs.events import RoundFinished
from fedkd.simulations.deploy.folder import deployable
from fedkd.simulations.deploy.plan import Plan
from fedkd.simulations.local import run_local
from fedkd.studies.audit.study import unseen
from tests.conftest import Tiny

DOMAINS = "data.domains={sources: [invert, noise], target: {name: rotate, degrees: 90}}"
ADAPT = (
    "rounds=1", "teachers.epochs=1", "teachers.models=[mlp]", "student.model=mlp",
    "fusion={name: knowledge_vote, focus: true}",
    "distillation.losses=[kd, {name: im, weight: 0.3}, fixmatch]", "distillation.epochs=2",
)  # fmt: skip


@pytest.mark.smoke
def test_each_client_has_its_domain_and_everything_else_is_of_the_target(tiny: Tiny) -> None:
    words = ("data.validation=12", "data.holdout=0.2")
    plain, moved = build_data(tiny(*words)), build_data(tiny(*words, DOMAINS))
    train, _ = load_dataset("synthetic", classes=4, size=8, per_class=60)
    turned = shifted(train, Shift("rotate", {"degrees": 90}), "train")
    for client, name in enumerate(("invert", "noise", "invert")):
        whole = shifted(train, name, "train")
        for rows, mine in (
            (plain.shard_rows, moved.shard(client)), (plain.holdout_rows, moved.holdout(client))
        ):  # fmt: skip
            assert torch.equal(mine.images, whole.images[torch.from_numpy(rows[client])])
        assert torch.equal(moved.shard(client).labels, plain.shard(client).labels)
    for mine, before in (
        (moved.transfer.images, plain.transfer.images), (moved.validation, plain.validation)
    ):  # fmt: skip
        places = [
            int((train.images == one).flatten(1).all(1).nonzero()[0]) for one in before.images
        ]
        assert torch.equal(mine.images, turned.images[places])
    assert torch.equal(moved.transfer.true_labels, plain.transfer.true_labels)
    assert moved.mean == moved.transfer.images.statistics()[0]
    assert len(moved.test) == 60
    assert [len(test) for test in moved.source_tests] == [60, 60]
    assert torch.equal(moved.source_tests[0].images, 255 - plain.test.images)
    assert torch.equal(moved.source_tests[1].labels, moved.test.labels)
    assert (plain.domains, plain.source_tests) == (None, ())


def test_beside_colour_all_domains_have_three_channels(tiny: Tiny) -> None:
    data = build_data(tiny("data.domains={sources: [plain, colour], target: blur}"))
    grey = build_data(tiny())
    assert data.shard(0).shape == data.shard(1).shape == data.test.shape == (3, 8, 8)
    assert torch.equal(data.shard(0).images, coloured(grey.shard(0)).images)
    assert data.shard(1).images.double().std(dim=1).max() > 50


def test_a_transfer_set_of_another_data_set_is_of_the_target_too() -> None:
    train, test = load_dataset("synthetic", classes=4, per_class=20)
    other, _ = load_dataset("synthetic", classes=3, size=10, channels=3, per_class=10)
    options = {"clients": 2, "partition": "iid", "transfer_size": 12, "seed": 0}
    domains = Domains((Shift("plain"),), Shift("invert"))
    plain = federate(train, test, transfer_images=other, **options)
    moved = federate(train, test, transfer_images=other, domains=domains, **options)
    assert torch.equal(moved.transfer.images.images, 255 - plain.transfer.images.images)


def test_teachers_and_student_are_judged_in_every_domain(tiny: Tiny, lean: None) -> None:
    run = run_local(tiny(*ADAPT, DOMAINS))
    (last,) = run.events(RoundFinished)
    assert last.sources is not None
    assert [scores.name for scores in last.sources] == ["invert", "noise"]
    for scores in last.sources:
        assert set(scores.teachers) == {0, 1, 2}
        assert 0 <= scores.student <= 1
    context = ExperimentContext(run.experiment)
    assert len(context.images(Images.SOURCES, 0)) == 120
    bank = run.knowledge(1, Images.SOURCES).bank(context.prediction_kinds)
    answers = torch.tensor(bank.arrays[context.prediction_kinds[0]][1])
    right = (answers[60:].argmax(1) == context.data.source_tests[1].labels).double().mean()
    assert last.sources[1].teachers[1] == pytest.approx(float(right))

    card = domains_card(Found(run))
    assert card is not None
    assert card.table is not None
    assert [column.title for column in card.table.columns] == [
        "who", "target: rotate degrees=90", "invert", "noise", "forgotten",
    ]  # fmt: skip
    names = [getattr(row.cells[0], "text", row.cells[0]) for row in card.table.rows]
    assert names == ["teachers of invert", "teachers of noise", "ensemble", "student"]
    first, second = last.sources
    home = [(first.teachers[0] + first.teachers[2]) / 2, second.teachers[1]]
    lost = sum(home) / 2 - (first.student + second.student) / 2
    assert card.table.rows[-1].cells[-1] == f"{100 * lost:.2f}".replace("-", "−")


def test_without_domains_nothing_more_is_asked(tiny: Tiny, lean: None) -> None:
    run = run_local(tiny("rounds=1", "teachers.epochs=1", "distillation.epochs=1"))
    assert run.events(RoundFinished)[0].sources is None
    assert not (run.path / "knowledge" / "round-0001" / "sources").exists()
    assert domains_card(Found(run)) is None


def test_a_resumed_run_asks_in_every_domain_again(tiny: Tiny, lean: None) -> None:
    class Stop(Exception):
        pass

    def stop(event: str, **facts: object) -> None:
        if event == "phase" and facts["round"] == 2 and facts["phase"] == "distil":
            raise Stop

    words = (*ADAPT, DOMAINS, "rounds=2")
    whole, cut = run_local(tiny(*words)), RunDirectory.new(tiny(*words))
    with pytest.raises(Stop):
        run_local(cut.experiment, run=cut, notify=stop)
    run_local(cut.experiment, run=RunDirectory.open(cut.path))
    hashes = [run.read_json("summary.json")["hash"] for run in (whole, cut)]
    assert hashes[0] == hashes[1]
    assert whole.events(RoundFinished)[-1].sources == cut.events(RoundFinished)[-1].sources


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.domains={sources: [], target: blur}"], "data.domains.sources: "),
        (["data.domains={sources: [blur]}"], "data.domains.target: "),
        (
            ["data.domains={sources: [blurr], target: blur}"],
            r"data.domains.sources.0: unknown shift 'blurr'; did you mean 'blur'",
        ),
        (
            ["data.domains={sources: [blur, blur], target: edges}"],
            "data.domains.sources: blur is listed twice",
        ),
        (
            ["data.domains={sources: [blur], target: {name: rotate, degree: 3}}"],
            "data.domains.target: shift 'rotate' has no option 'degree'; did you mean 'degrees'",
        ),
        ([DOMAINS, "data.public=public.npz"], "data.domains: changes the images that are dealt"),
    ],
)
def test_what_cannot_be_is_refused_before_images_are_read(
    tiny: Tiny, words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check(tiny(*words))


def test_a_domain_without_a_client_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"^data: domains.sources: 2 domains for 1 clients"):
        build_data(tiny(DOMAINS, "clients=1"))


def test_nodes_get_their_images_as_they_are_and_audits_refuse(tiny: Tiny, tmp_path: Path) -> None:
    changes = deployable(tiny(DOMAINS), Plan(3, ("localhost",), own_data=True))
    assert "data.domains=null" in changes
    with pytest.raises(ConfigError, match=r"data\.domains: .*audit a run without it"):
        unseen(ExperimentContext(tiny(DOMAINS)))
