"""Banks, fusion over a whole bank, and knowledge on disk."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from fedkd.fusion import FUSIONS
from fedkd.io.records import Damaged
from fedkd.knowledge import payload as payload_module
from fedkd.knowledge.kinds import Logits, VirtualLogits
from fedkd.knowledge.payload import Bank, Ensemble, Knowledge, Teacher, fuse
from fedkd.knowledge.store import KnowledgeStore

KINDS = (Logits(), VirtualLogits(0))


def knowledge(client: int, samples: int = 10, classes: int = 3) -> Knowledge:
    generator = torch.Generator().manual_seed(client)
    tensors = {k: torch.randn(samples, classes, generator=generator).half() for k in KINDS}
    return Knowledge(Teacher(client, 5 + client, (client + 1, 2, 0)), tensors)


def test_order_of_arrival_does_not_matter(tmp_path: Path) -> None:
    one, two = KnowledgeStore(tmp_path / "1"), KnowledgeStore(tmp_path / "2")
    for client in (0, 1, 2):
        one.put(knowledge(client))
    for client in (2, 0, 1):
        two.put(knowledge(client))
    rules = [FUSIONS.create("class_gated"), FUSIONS.create("entropy")]
    first, second = (fuse(store.bank(KINDS), rules) for store in (one, two))
    assert torch.equal(first.probabilities, second.probabilities)
    assert np.array_equal(first.bank.weights, second.bank.weights)


def test_disk_and_memory_say_the_same(tmp_path: Path) -> None:
    items = [knowledge(client) for client in range(4)]
    store = KnowledgeStore(tmp_path)
    for item in items:
        store.put(item)
    rules = [FUSIONS.create("class_gated")]
    on_disk = fuse(store.bank(KINDS), rules, store=store.allocate)
    in_memory = fuse(Bank.of(items), rules)
    assert torch.equal(on_disk.probabilities, in_memory.probabilities)
    rows = torch.tensor([3, 1])
    for kind in KINDS:
        left, right = (fused.bank.rows(rows).tensors[kind] for fused in (on_disk, in_memory))
        assert torch.equal(left, right)


def test_grouping_of_samples_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = Bank.of([knowledge(client) for client in range(3)])
    rules = [FUSIONS.create("class_gated"), FUSIONS.create("entropy")]
    whole = fuse(bank, rules)
    monkeypatch.setattr(payload_module, "FUSION_BUDGET", 1)  # one sample at a time
    single = fuse(bank, rules)
    assert torch.allclose(whole.probabilities, single.probabilities, atol=1e-6)
    assert torch.equal(whole.targets, single.targets)


def test_a_client_is_kept_once_and_half_written_ones_are_swept(tmp_path: Path) -> None:
    store = KnowledgeStore(tmp_path)
    store.put(knowledge(1))
    before = store.bank(KINDS).rows(torch.arange(10)).tensors[Logits()]
    other = Knowledge(Teacher(1, 1, (1, 1, 1)), {k: torch.zeros(10, 3).half() for k in KINDS})
    store.put(other)
    assert torch.equal(store.bank(KINDS).rows(torch.arange(10)).tensors[Logits()], before)
    (tmp_path / ".client-0002").mkdir()
    again = KnowledgeStore(tmp_path)
    assert again.clients() == [1]
    again.sweep()
    assert not (tmp_path / ".client-0002").exists()
    (tmp_path / ".client-0003").mkdir()
    again.put(knowledge(3))
    assert again.clients() == [1, 3]


def test_true_labels_win_over_pseudo_labels() -> None:
    bank = Bank.of([knowledge(0)])
    labels = torch.arange(10) % 3
    assert torch.equal(fuse(bank, [], labels=labels).targets, labels)
    guessed = fuse(bank, [])
    assert torch.equal(guessed.targets, guessed.probabilities.argmax(1))


def test_a_rule_may_merge_teachers(tmp_path: Path) -> None:
    def first_only(ensemble: Ensemble) -> Ensemble:
        return Ensemble(
            ensemble.teachers[:1],
            {kind: tensor[:1].clone() for kind, tensor in ensemble.tensors.items()},
            torch.ones(1, ensemble.num_samples),
        )

    bank = Bank.of([knowledge(client) for client in range(3)])
    merged = fuse(bank, [first_only]).bank
    assert len(merged.teachers) == 1
    expected = knowledge(0).tensors[Logits()].float()
    assert torch.equal(merged.rows(torch.arange(10)).tensors[Logits()][0], expected)


def test_unequal_kinds_and_nobody_are_named() -> None:
    odd = Knowledge(Teacher(7), {Logits(): torch.zeros(10, 3)})
    with pytest.raises(ValueError, match="client 7 shares \\['logits'\\]"):
        Bank.of([knowledge(0), odd])
    with pytest.raises(ValueError, match="no teacher"):
        Bank.of([])


def test_readers_make_and_delete_nothing(tmp_path: Path) -> None:
    """Opening a round for reading used to make its folder and delete whatever began with a dot."""
    victim = tmp_path / "victim"
    for name in (".ssh", ".config", ".client-0000"):
        (victim / name).mkdir(parents=True)
    (tmp_path / "transfer").symlink_to(victim)
    store = KnowledgeStore(tmp_path / "transfer")
    assert store.clients() == []
    for step in (store.sweep, lambda: store.put(knowledge(1))):
        with pytest.raises(Damaged, match=r"transfer is damaged .a symbolic link"):
            step()
    assert KnowledgeStore(tmp_path / "nowhere").clients() == []
    assert not (tmp_path / "nowhere").exists()
    assert sorted(path.name for path in victim.iterdir()) == [".client-0000", ".config", ".ssh"]


def test_a_draft_that_is_a_link_takes_nothing_with_it(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").touch()
    folder = tmp_path / "transfer"
    folder.mkdir()
    for number in (1, 2):
        (folder / f".client-{number:04d}").symlink_to(tmp_path / "victim")
    (folder / ".DS_Store").touch()
    (folder / ".nfs0001").touch()
    store = KnowledgeStore(folder)
    store.put(knowledge(1))
    store.sweep()
    assert sorted(p.name for p in folder.iterdir()) == [".DS_Store", ".nfs0001", "client-0001"]
    assert (tmp_path / "victim" / "file").is_file()


def test_a_reader_beside_a_live_server_does_no_harm(tmp_path: Path) -> None:
    """Of 200 answers 22 were lost while a report was written again and again."""
    stop, problems = threading.Event(), []

    def look() -> None:
        while not stop.is_set():
            try:
                store = KnowledgeStore(tmp_path)
                if store.clients():
                    store.bank(KINDS)
            except Exception as error:
                problems.append(error)

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        store = KnowledgeStore(tmp_path)
        for client in range(200):
            store.put(knowledge(client, samples=2))
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert problems == []
    assert store.clients() == [*range(200)]


@pytest.mark.parametrize("name", ["logits.npy", "teacher.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["empty", "cut", "flipped", "gone"])
def test_what_the_disk_lost_is_noticed(tmp_path: Path, name: str, harm: str) -> None:
    KnowledgeStore(tmp_path).put(knowledge(0))
    file = tmp_path / "client-0000" / name
    content = file.read_bytes()
    if harm == "gone":
        file.unlink()
    else:
        changed = bytes([*content[:-3], content[-3] ^ 1, *content[-2:]])
        file.write_bytes({"empty": b"", "cut": content[:-7], "flipped": changed}[harm])
    if (name, harm) == ("manifest.json", "gone"):  # as earlier versions of fedkd wrote it
        assert KnowledgeStore(tmp_path).bank(KINDS).num_samples == 10
        return
    for read in (
        lambda store: store.check(0),
        lambda store: store.bank(KINDS),
        lambda store: store.answers(0, KINDS),
    ):
        with pytest.raises(Damaged, match=name):
            read(KnowledgeStore(tmp_path))
