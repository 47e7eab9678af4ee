"""`fedkd data check`: what is there, what cannot be read, and what to write."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fedkd.config import ConfigError, make_experiment
from fedkd.data.datasets import load_dataset
from fedkd.simulations.cli.data import check


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for number in range(4):
        for name in ("cat", "dog"):
            file = tmp_path / "pictures" / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (10 + number, 12), (20 * number, 0, 200)).save(file)
    (tmp_path / "pictures" / "cat" / "broken.jpg").write_bytes(b"no picture")
    return tmp_path / "pictures"


def written(out: str) -> dict[str, object]:
    """The part of a config that was shown."""
    return yaml.safe_load(out[out.index("data:\n") :])


def test_a_folder_of_pictures(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(pictures, size=8)
    out = capsys.readouterr().out
    assert "images: 3 x 8 x 8, pixels from 0 to 200 of 0 to 255" in out
    assert "10 to 13 pixels wide and 12 high, 2 of 8 square" in out
    assert "broken.jpg" in out
    given = make_experiment(written(out)).data.dataset
    assert (given.name, given.options["skip_unreadable"]) == ("image_folder", True)
    train, test = load_dataset(given.name, **given.options)
    assert (len(train), len(test), train.classes) == (6, 2, ("cat", "dog"))


def test_a_file_of_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.arange(10 * 16, dtype=np.uint8).reshape(10, 4, 4)
    np.savez(tmp_path / "mine.npz", x=x, y=np.arange(10) % 2)
    check(tmp_path / "mine.npz")
    out = capsys.readouterr().out
    assert "images: 1 x 4 x 4" in out
    assert written(out) == {
        "data": {"dataset": {"name": "npz", "path": str(tmp_path / "mine.npz")}}
    }


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file or folder"):
        check(tmp_path / "nowhere")
    (tmp_path / "mine.csv").write_text("a,b")
    with pytest.raises(ConfigError, match=r"expected a file that ends with \.npz"):
        check(tmp_path / "mine.csv")
    np.savez(tmp_path / "floats.npz", x=np.zeros((4, 2, 2)), y=np.arange(4))
    with pytest.raises(ConfigError, match="uint8"):
        check(tmp_path / "floats.npz")
