"""The report of made-up runs: finished, under way, failed, hostile, large."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from fedkd.build import build_data, build_network
from fedkd.config import make_experiment
from fedkd.io.text import ranges
from fedkd.knowledge.kinds import Logits
from fedkd.knowledge.payload import Knowledge, Teacher, fuse
from fedkd.reporting.format import human_bytes, percent
from fedkd.reporting.relation_report import graphs, likeness
from fedkd.reporting.run_cards import presence_card
from fedkd.reporting.run_page import make_page, write_report
from fedkd.reporting.run_record import Found
from fedkd.reporting.script import DIGEST, SCRIPT
from fedkd.reporting.template import PAGE
from fedkd.runs.directory import RunDirectory, network_hash
from fedkd.runs.events import (
    ClientsAsked,
    EpochFinished,
    MessageCounted,
    OldAnswersCounted,
    ReplyRefused,
    RoundFinished,
)
from fedkd.training.evaluation import Calibration, Scores

PAGES = True
NAN = float("nan")


def _scores(accuracy, classes, unknown=()):
    per_class = [NAN if c in unknown else accuracy for c in range(classes)]
    bins = {"confidence": [NAN, 0.5, 0.9], "accuracy": [NAN, 0.4, 0.95], "counts": [0, 40, 60]}
    return Scores(accuracy=accuracy, per_class=per_class, calibration=Calibration(ece=0.07, **bins))


def _run(tmp_path, *, clients=3, rounds=2, finished=2, summary=True, root=None, **options):
    """A run directory as a run leaves it after `finished` rounds, with invented numbers."""
    data = {
        "dataset": options.get("dataset", "digits"),
        "partition": "iid",
        "transfer": {"size": 60},
    }
    given = {"name": "invented", "rounds": rounds, "clients": clients, "fusion": ["class_gated"]}
    place = {"root": str(root)} if root else {}
    experiment = make_experiment({**given, "data": data | place, "student": {"model": "mlp"}})
    run = RunDirectory.new(experiment, tmp_path)
    names = options.get("classes") or [str(c) for c in range(10)]
    teachers = options.get("teachers", True)
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, len(names), (60,), generator=generator)
    counts = torch.randint(0, 9, (clients, len(names)), generator=generator)
    student = None
    if finished and not root and len(names) == 10:
        student = build_network(experiment, experiment.student.model, build_data(experiment), "s")
    for number in range(1, finished + 1):
        for client in range(clients):
            logits = torch.randn(60, len(names), generator=generator)
            logits[torch.arange(60), truth] += 2
            who = Teacher(client, int(counts[client].sum()), tuple(counts[client].tolist()))
            run.knowledge(number).put(Knowledge(who, {Logits(): logits.half()}))
            for phase, up in (("train", 300), ("knowledge", 9000), ("evaluate", 4000)):
                run.count(MessageCounted(round=number, phase=phase, client=client, down=700, up=up))
        store = run.knowledge(number)
        fuse(store.bank((Logits(),)), [], store=store.allocate)
        for epoch in (1, 2, 3):
            terms = {"dkd": 2.0 / epoch, "vrm": 40.0 / epoch}
            run.record(
                EpochFinished(round=number, epoch=epoch, loss=6.0 / epoch, terms=terms, lr=0.1)
            )
        unknown = options.get("unknown", ())
        of_teachers = {
            "teachers": {c: 0.3 + 0.2 * c / clients for c in range(clients)},
            "ensemble": _scores(0.8, len(names), unknown),
        }
        finished_round = RoundFinished(
            round=number,
            hash="0123456789abcdef" if student is None else network_hash(student),
            status="ok" if number != 2 else "degraded",
            answered=list(range(clients)),
            seconds={"train": 3.0, "knowledge": 1.0, "fuse": 0.1, "distil": 4.0, "evaluate": 0.5},
            student=_scores(0.5 + 0.1 * number, len(names), unknown),
            pseudo_labels=0.75,
            **(of_teachers if teachers else {}),
        )
        run.record(finished_round)
    if student is not None:
        run.save_checkpoint(finished, {"student": student.state_dict(), "optimizer": None})
    if summary:
        empty: dict = {"teachers": [], "refused": [], "degraded_rounds": [], "bytes": {}}
        accuracy = {"accuracy": 0.7, "best_accuracy": 0.7, "best_round": 1}
        facts = {
            "name": "invented", "seed": 0, "classes": names, "class_counts": counts.tolist(),
            "transfer": {"size": 60, "labelled": False, "bytes": 60 * 64},
            "student": {"model": "cnn_tiny", "parameters": 1234, **accuracy},
            "oracle": 0.9, "ceiling": None, "seconds": {"total": 30.0}, **empty,
        }  # fmt: skip
        run.write_json("summary.json", facts)
    return run


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A complete run and its page; drawing one takes seconds."""
    run = _run(tmp_path_factory.mktemp("complete"))
    run.count(MessageCounted(round=1, phase="describe", client=987654321, down=5, up=5))
    before = _files(run)
    write_report(run)
    return run, before


def _files(run):
    return {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}


def _page(run):
    return write_report(run).read_text(encoding="utf-8")


class _Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.mark.smoke
def test_page_needs_nothing_but_itself(complete):
    page = (complete[0].path / "report.html").read_text(encoding="utf-8")
    tags = _Tags(page).found
    assert not {"link", "iframe", "object"} & {tag for tag, _ in tags}
    assert [attributes for tag, attributes in tags if tag == "script"] == [{}]
    assert page.count(f"<script>{SCRIPT}</script>") == 1
    assert f"script-src 'sha256-{DIGEST}'\"" in page
    beside = {path.name for path in complete[0].path.iterdir()}
    for tag, attributes in tags:
        for name in ("src", "href", "xlink:href", "data"):
            target = attributes.get(name, "#")
            fine = target.startswith(("#", "data:image/png")) or (tag == "a" and target in beside)
            assert fine, (tag, name, target[:60])
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    assert len(page) < 3e6


def test_ids_are_unique_and_every_reference_has_its_target(complete):
    page = (complete[0].path / "report.html").read_text(encoding="utf-8")
    ids = [attributes["id"] for _, attributes in _Tags(page).found if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:href="|url\()#([\w-]+)', page)
    assert set(used) <= set(ids)


def test_same_run_gives_same_bytes(complete):
    run, _ = complete
    first = (run.path / "report.html").read_bytes()
    assert write_report(RunDirectory.open(run.path)).read_bytes() == first


def test_report_leaves_the_run_as_it_was(complete):
    run, before = complete
    after = _files(run)
    assert after.pop(run.path / "report.html")
    assert after == before


def test_nodes_that_describe_themselves_are_no_clients(complete):
    page = (complete[0].path / "report.html").read_text(encoding="utf-8")
    assert "987654321" not in page
    assert ">describe<" in page


def test_text_from_outside_cannot_become_html_and_lost_images_cost_their_pictures(tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    names = [f"{evil}{c}" if c % 2 else f"$\\frac{{{c}$ & _" for c in range(10)]
    run = _run(tmp_path, classes=names, root=tmp_path / "nowhere", dataset="fashion_mnist")
    run.record(ReplyRefused(round=1, phase="knowledge", client=2, reason=evil))
    run.warn(evil)
    page = _page(run)
    assert "The images could not be loaded" in page
    assert "Agreement" in page
    assert "Not shown: the data could not be loaded" in page
    assert "&lt;script&gt;alert(1)" in page
    tags = _Tags(page).found
    assert [tag for tag, _ in tags].count("script") == 1  # ours
    assert "img" not in {tag for tag, _ in tags}
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)


@pytest.mark.smoke
def test_complete_run_shows_every_part(complete):
    page = (complete[0].path / "report.html").read_text(encoding="utf-8")
    for part in (
        "complete · 2 rounds", "no quorum in round 2", "70.0 %", "best teacher", "oracle",
        "Test accuracy per round", "Loss terms per epoch", "Private images per client",
        "Accuracy per class", "Agreement", "Relations between classes",
        "Relations between samples", "Calibration", "Bytes per round", "Accuracy for bytes",
        "Time per phase", "Resolved config", "Versions", "Nothing: every reply",
    ):  # fmt: skip
        assert part in page, part
    assert ">ceiling<" not in page  # it could not be trained in this run
    assert "Not shown" not in page


@pytest.mark.parametrize("finished", [0, 1])
def test_run_under_way_has_a_report(tmp_path, finished):
    page = _page(_run(tmp_path, rounds=4, finished=finished, summary=False))
    expected = "no round of 4 has finished yet" if finished == 0 else "1 of 4 rounds so far"
    assert expected in page
    assert "complete · " not in page.replace("not complete · ", "")
    assert ("no client has been asked yet" in page) == (finished == 0)


def test_damaged_knowledge_is_named_and_costs_only_its_pictures(tmp_path):
    run = _run(tmp_path, finished=1)
    (run.path / "knowledge/round-0001/transfer/client-0001/logits.npy").write_bytes(b"short")
    page = _page(run)
    assert "<h3>Agreement</h3>" in page
    assert "Not shown: " in page
    assert "Test accuracy per round" in page


def test_teachers_without_evaluation_and_classes_without_images(tmp_path):
    page = _page(_run(tmp_path, teachers=False, unknown=(3,)))
    assert "median teacher" not in page
    assert "without test images" in page
    page = page.replace(SCRIPT, "")
    assert "nan" not in re.sub(r"data:image/png;base64,[^\"]*", "", page).lower()


def test_many_clients_and_classes_stay_small(tmp_path):
    names = [f"class number {c}" for c in range(120)]
    run = _run(
        tmp_path, clients=60, classes=names, unknown=(5,), root=tmp_path / "nowhere",
        dataset="fashion_mnist",
    )  # fmt: skip
    page = _page(run)
    assert "60 teachers" in page
    assert len(page) < 3e6


@pytest.mark.parametrize("clients", [5, 90])
def test_who_was_there_is_drawn(tmp_path, clients):
    run = _run(tmp_path, clients=clients, finished=0, summary=False)
    everybody = range(clients)
    for number, asked in ((1, [4, 0]), (2, [1, 2, 4])):
        there = ranges(client for client in everybody if client != 3 or number == 2)
        run.record(ClientsAsked(round=number, asked=asked, wanted=2, there=there))
        scores = _scores(0.5, 10)
        run.record(RoundFinished(round=number, student=scores, answered=sorted(asked)[1:]))
    run.record(OldAnswersCounted(round=2, clients={0: 1}))
    run.record(ClientsAsked(round=3, asked=[3], wanted=1, there="3"))  # under way
    card = presence_card(Found(run))
    assert "1 time a client counted by an earlier answer, 1 rounds old" in card.caption
    assert f"Of {clients} clients that were there at some time, a round asked 2.5" in card.caption
    assert "2 times a client was asked and gave nothing" in card.caption
    assert Found(run).clients == [0, 1, 2, 4]
    assert "4 private teachers" in make_page(Found(run)).sentence
    (drawn,) = card.figures
    labels = [text.get_text() for text in drawn.axes[0].get_yticklabels()]
    assert (labels == [str(client) for client in everybody]) == (clients == 5)
    assert "an old answer counted" in [text.get_text() for text in drawn.legends[0].get_texts()]
    cells = [text.get_text() for text in drawn.axes[0].texts]
    assert [cell for cell in cells if cell] == (["1"] if clients == 5 else [])


def test_graphs_against_numpy():
    generator = torch.Generator().manual_seed(1)
    student, teachers = torch.randn(2, 40, 5, generator=generator, dtype=torch.double)
    seen = graphs(student, teachers)
    rows = student.numpy()
    rows = (rows - rows.mean(1, keepdims=True)) / rows.std(1, keepdims=True)
    np.testing.assert_allclose(seen.class_student, np.corrcoef(rows.T), atol=1e-9)
    order = np.argsort(teachers.argmax(1).numpy(), kind="stable")
    unit = rows[order] / np.linalg.norm(rows[order], axis=1, keepdims=True)
    np.testing.assert_allclose(seen.sample_student, unit @ unit.T, atol=1e-9)
    assert sum(count for _, count in seen.blocks) == 40


def test_equal_predictors_have_equal_graphs():
    logits = torch.randn(30, 4, generator=torch.Generator().manual_seed(2))
    seen = graphs(logits, logits + 3.0)  # a constant per sample changes no prediction
    alike, apart = likeness(seen.class_student, seen.class_teachers)
    assert alike == pytest.approx(1)
    assert apart == pytest.approx(0, abs=1e-5)


def test_graphs_of_many_classes_draw_the_most_frequent_ones():
    logits = torch.randn(300, 150, generator=torch.Generator().manual_seed(3))
    seen = graphs(logits, logits)
    assert len(seen.classes) == 100
    assert len(seen.blocks) <= 20
    assert seen.sample_student.shape == (len(seen.sample_student),) * 2
    assert len(seen.sample_student) <= 120


def test_words_for_numbers():
    assert percent(0.8712) == "87.1 %"
    assert percent(None) == percent(NAN) == "\N{EN DASH}"
    assert [human_bytes(n) for n in (12, 1234, 5_600_000, 7.5e9)] == [
        "12 B", "1.2 kB", "5.6 MB", "7.50 GB",
    ]  # fmt: skip
    assert "{{" in PAGE
    assert json.dumps(NAN) == "NaN"  # how a class without test images reaches the report
