"""Files of Hugging Face's `datasets`, its objects, and partitioners of Flower Datasets."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fedkd
from fedkd.config import ConfigError, make_experiment
from fedkd.data.images import ImageSet
from fedkd.simulations.local import run_local
from tests.conftest import TINY

hugging = pytest.importorskip("datasets")

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
LABELS = np.arange(60) % 3
NAMES = ["ash", "birch", "cedar"]


def table(*rows: int, image: str = "img", **more: Any) -> Any:
    chosen = rows or range(60)
    features = {image: hugging.Image(), "label": hugging.ClassLabel(names=NAMES)}
    columns = {image: [Image.fromarray(PIXELS[n]) for n in chosen], "label": LABELS[[*chosen]]}
    made = hugging.Dataset.from_dict(columns, features=hugging.Features(features))
    for name, values in more.items():
        made = made.add_column(name, values)
    return made


def test_columns_are_found_by_type_decoded_or_not() -> None:
    expected = torch.from_numpy(PIXELS)[:, None]
    for dataset in (
        table(),
        table(image="photo"),
        table().cast_column("img", hugging.Image(decode=False)),
        table(other=list(range(60))),
        table().with_format("numpy"),
    ):
        images = ImageSet.from_dataset(dataset)
        assert torch.equal(images.images, expected)
        assert images.classes == tuple(NAMES)
    plain = hugging.Dataset.from_dict({"pixel_values": PIXELS[:6].tolist(), "labels": LABELS[:6]})
    read = ImageSet.from_dataset(plain, range=(0, 255), names=NAMES)
    assert torch.equal(read.images, expected[:6])


def test_columns_that_are_not_clear_have_to_be_named() -> None:
    two = table(coarse=[0] * 60).cast_column("coarse", hugging.ClassLabel(names=["tree", "shrub"]))
    with pytest.raises(ValueError, match="several columns of classes, label, coarse; name one"):
        ImageSet.from_dataset(two)
    assert ImageSet.from_dataset(two, label="coarse").classes == ("tree", "shrub")
    with pytest.raises(ValueError, match=r"there is no column 'lable'.* did you mean 'label'"):
        ImageSet.from_dataset(table(), label="lable")
    with pytest.raises(ValueError, match=r"DatasetDict of 'train'; give one of them"):
        ImageSet.from_dataset(hugging.DatasetDict(train=table()))
    unlabelled = table().map(lambda row: {"label": -1}, load_from_cache_file=False)
    with pytest.raises(ValueError, match="60 of 60 are negative"):
        ImageSet.from_dataset(unlabelled)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    parts = {"train": range(36), "validation": range(36, 48), "test": range(48, 60)}
    splits = {name: table(*rows) for name, rows in parts.items()}
    hugging.DatasetDict(splits).save_to_disk(str(folder / "saved"))
    splits["train"].save_to_disk(str(folder / "one"))
    (folder / "parquet" / "data").mkdir(parents=True)
    for number in range(2):
        half = splits["train"].select(range(18 * number, 18 * number + 18))
        half.to_parquet(folder / "parquet" / "data" / f"train-{number:05}-of-00002.parquet")
    splits["test"].to_parquet(folder / "parquet" / "data" / "test-00000-of-00001.parquet")
    for row in range(12):
        place = folder / "pictures" / ("train" if row < 6 else "test")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[row]).save(place / f"{row}.png")
        with (place / "metadata.csv").open("a", encoding="utf-8") as file:
            file.write("" if file.tell() else "file_name,label\n")
            file.write(f"{row}.png,{NAMES[LABELS[row]]}\n")
    return folder


@pytest.mark.parametrize(
    ("path", "sizes"),
    [
        ("saved", (36, 12)),
        ("one", (30, 6)),
        ("parquet", (36, 12)),
        ("parquet/data/test-00000-of-00001.parquet", (9, 3)),
        ("pictures", (6, 6)),
    ],
)
def test_what_is_on_disk_is_read_as_it_is(written: Path, path: str, sizes: tuple[int, int]) -> None:
    before = sorted(written.rglob("*"))
    train, test = fedkd.load_dataset("hf", written, path=path)
    assert (len(train), len(test)) == sizes
    assert train.classes == test.classes == tuple(NAMES)
    if len(train) == 36:
        assert torch.equal(train.images[:, 0], torch.from_numpy(PIXELS[:36]))
    assert sorted(written.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "nowhere"}, "misses .*nowhere; expected a .parquet"),
        ({"path": "saved", "label": "kind"}, "saved: label: there is no column 'kind'"),
        ({"path": "saved", "classes": ["oak", "ash"]}, "there is no class 'oak'"),
        ({"path": "empty"}, "for folders of pictures take data set 'image_folder'"),
        ({"path": "bad.parquet"}, "bad.parquet: cannot be read as a data set"),
    ],
)
def test_what_cannot_be_read_is_one_line(written: Path, options: Any, message: str) -> None:
    (written / "empty").mkdir(exist_ok=True)
    (written / "bad.parquet").write_bytes(b"none")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        fedkd.load_dataset("hf", written, **options)
    assert "\n" not in str(error.value)


def test_a_run_takes_such_a_data_set_and_its_own_validation_images(
    written: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, lean: None
) -> None:
    dataset = {"name": "hf", "path": "saved", "classes": {"ash": "ash", "birch": "tree", 2: "tree"}}
    config = {
        **TINY,
        "clients": 2,
        "rounds": 1,
        "output": str(tmp_path / "runs"),
        "data": {"dataset": dataset, "root": str(written), "partition": "iid",
                 "transfer": {"size": 8}, "validation": 5},
        "evaluation": {"baselines": []},
    }  # fmt: skip
    run = run_local(make_experiment(config))
    assert run.read_json("signature.json")["classes"] == ["ash", "tree"]
    with pytest.raises(ConfigError, match="13 validation images are asked for"):
        run_local(make_experiment(config, ["data.validation=13"]))
    with caplog.at_level(logging.WARNING, "fedkd"):
        from fedkd.build import build_data

        split = build_data(make_experiment(config, ["data.validation=0"]))
    assert "the data set's 12 validation images are not used" in caplog.text
    assert len(split.source) == 36


def test_partitioners_of_flower_datasets_deal_as_they_do_in_flower() -> None:
    flower = pytest.importorskip("flwr_datasets.partitioner")
    train, test = table(writer=[f"w{n % 4}" for n in range(60)]), table(*range(12))
    options: dict[str, Any] = {"transfer_size": 12, "seed": 0}
    for partitioner in (
        flower.DirichletPartitioner(4, partition_by="label", alpha=0.5, min_partition_size=1),
        flower.NaturalIdPartitioner(partition_by="writer"),
        flower.IidPartitioner(4),
    ):
        data = fedkd.federate(train, test, clients=4, partition=partitioner, **options)
        assert not partitioner.is_dataset_assigned()
        partitioner.dataset = train
        for client in range(4):
            alone = partitioner.load_partition(client)
            theirs = {np.asarray(picture).tobytes() for picture in alone["img"]}
            mine = {picture.numpy().tobytes() for picture in data.shard(client).images}
            assert mine <= theirs
    assert fedkd.federate(train, test, partition=partitioner, **options).num_clients == 4
    images = ImageSet.from_dataset(train)
    assert fedkd.federate(images, test, clients=2, partition=flower.IidPartitioner(2), **options)
    with pytest.raises(ValueError, match=r"IidPartitioner .* makes 4 parts for 3 clients"):
        fedkd.federate(images, test, clients=3, partition=flower.IidPartitioner(4), **options)
    natural = flower.NaturalIdPartitioner(partition_by="writer")
    with pytest.raises(ValueError, match="NaturalIdPartitioner cannot deal"):
        fedkd.federate(images, images, clients=4, partition=natural, **options)


def test_a_federated_dataset_brings_images_test_set_and_partitioner(written: Path) -> None:
    flower = pytest.importorskip("flwr_datasets.partitioner")
    splits = {"train": table(), "test": table(*range(12))}
    partitioner = flower.IidPartitioner(3)
    partitioner.dataset = splits["train"]
    source = SimpleNamespace(partitioners={"train": partitioner}, load_split=splits.__getitem__)
    data = fedkd.federate(source, transfer_size=12, seed=0)
    assert (data.num_clients, len(data.test)) == (3, 12)
    with pytest.raises(ValueError, match="has its own partitioner"):
        fedkd.federate(source, partition="iid", transfer_size=12, seed=0)
