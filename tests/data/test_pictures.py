import logging
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from fedkd.data.pictures import read_picture, read_pictures

RNG = np.random.default_rng(3)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def claimed(width: int, height: int, depth: int = 1, colour: int = 0, body: bytes = b"") -> bytes:
    """A PNG file that says so much of itself."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = zlib.compress(body or b"\0" * 10)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_a_picture_is_upright_and_resized_as_pillow_would(tmp_path, turn, channels, mode):
    file = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(noise(10, 14, 3)).save(file, exif=exif)
    with Image.open(file) as picture:
        upright = ImageOps.exif_transpose(picture).convert(mode)
    expected = np.asarray(upright.resize((6, 5), Image.Resampling.BILINEAR))
    pixels = read_picture(file, channels=channels, height=5, width=6)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (5, 6, channels)
    assert pixels.reshape(expected.shape).tolist() == expected.tolist()
    assert read_picture(file, channels=3).shape[:2] == upright.size[::-1]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LA", "RGBA"])
def test_opaque_pictures_of_every_mode_are_converted_by_pillow(tmp_path, mode, caplog):
    file = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png")
    Image.fromarray(noise(4, 5, 3)).convert(mode).save(file)
    with Image.open(file) as picture:
        expected = np.asarray(picture.convert("RGB"))
    assert read_picture(file, channels=3).tolist() == expected.tolist()
    assert not caplog.records


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "RGB"])
def test_transparent_pictures_are_laid_on_white_and_mentioned_once(tmp_path, mode, caplog):
    layered = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    layered.putpixel((0, 0), (0, 0, 0, 0))
    for number in range(3):
        file = tmp_path / f"{number}.png"
        if mode in ("P", "RGB"):  # one colour of the file means transparent
            flat = Image.new("RGB", (2, 1))
            flat.putpixel((0, 0), (9, 8, 7))
            flat = flat.quantize(2) if mode == "P" else flat
            hidden = flat.getpixel((0, 0)) if mode == "P" else (9, 8, 7)
            flat.save(file, transparency=hidden)
        else:
            layered.convert(mode).save(file)
    files = sorted(tmp_path.glob("*.png"))
    with caplog.at_level(logging.WARNING, "fedkd.data.pictures"):
        pixels = read_pictures(files, channels=3, height=1, width=2)
    assert pixels.tolist() == [[[[255] * 3, [0] * 3]]] * 3
    assert [r.getMessage() for r in caplog.records] == [
        f"3 of 3 pictures are partly transparent and are laid on white (the first is {files[0]})"
    ]


def test_an_animation_is_read_with_a_warning(tmp_path, caplog):
    frames = [Image.new("L", (3, 3), value) for value in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_picture(tmp_path / "a.gif", channels=1)[0, 0, 0] == 10
    assert "more than one frame" in caplog.text


@pytest.mark.parametrize("kind", ["png", "tiff", "float", "png of 12 bits"])
def test_more_than_eight_bits_are_refused_with_advice_that_scales(tmp_path, kind):
    file = tmp_path / ("x.png" if "png" in kind else "x.tiff")
    if kind == "float":
        Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(file)
    elif kind == "png of 12 bits":  # colour: Pillow reads the upper bytes, here 0 to 15
        rows = b"".join(b"\0" + np.full(12, 4000, ">u2").tobytes() for _ in range(4))
        file.write_bytes(claimed(4, 4, depth=16, colour=2, body=rows))
    else:
        Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(file)
    with pytest.raises(ValueError, match=r"x\.\w+: .*more than 8 bits .*255\)\.round") as error:
        read_picture(file, channels=1)
    assert "\n" not in str(error.value)


def test_what_is_no_picture_is_refused_in_one_line_that_names_the_file(tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.fromarray(noise(64, 64, 3)).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:900])
    Image.fromarray(noise(32, 32, 3)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:500])
    (tmp_path / "text.jpg").write_text("an error page\n")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "slide.png").write_bytes(claimed(30000, 20000))
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "two\nlines.png").write_bytes(b"x")
    bad = ["cut.jpg", "cut.png", "text.jpg", "empty.png", "slide.png", "folder.png", "pipe.png"]
    for name in [*bad, "two\nlines.png", "absent.png"]:
        with pytest.raises(ValueError, match=name.replace("\n", r"\\n")) as error:
            read_picture(tmp_path / name, channels=3, height=4, width=4)
        assert "\n" not in str(error.value)
        assert str(error.value).count(str(tmp_path)) == 1


def test_a_large_picture_below_pillows_limit_is_read_without_its_warning(
    tmp_path, recwarn, monkeypatch
):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow warns above it, refuses twice it
    file = Path(tmp_path / "large.png")
    Image.new("1", (15, 10)).save(file)
    assert read_picture(file, channels=1, height=2, width=3).shape == (2, 3, 1)
    assert not recwarn.list
    Image.new("1", (15, 14)).save(file)
    with pytest.raises(ValueError, match=r"large\.png: too large a picture .*210 pixels"):
        read_picture(file, channels=1, height=2, width=3)


def test_damaged_pictures_never_raise_anything_else(tmp_path):
    file = tmp_path / "a"
    for suffix in ("png", "jpg", "gif", "tiff", "bmp", "webp"):
        Image.fromarray(noise(9, 9, 3)).save(file, format="jpeg" if suffix == "jpg" else suffix)
        content = file.read_bytes()
        for _ in range(25):
            changed = bytearray(content)
            for place in RNG.integers(0, len(content), 3):
                changed[place] = RNG.integers(256)
            file.write_bytes(bytes(changed[: RNG.integers(8, len(content))]))
            try:
                shape = read_picture(file, channels=3, height=3, width=3).shape
            except ValueError as error:
                shape = (3, 3, 3) if str(file) in str(error) else ()
            assert shape == (3, 3, 3)


def test_two_channels_are_not_a_picture(tmp_path):
    with pytest.raises(ValueError, match=r"channels: expected 1 .grey. or 3 .colour., got 2"):
        read_picture(tmp_path / "a.png", channels=2)


def test_a_picture_of_few_bytes_and_many_pixels_is_not_unpacked(tmp_path: Path) -> None:
    """10 kB used to take 460 MB of memory."""
    file = tmp_path / "z.png"
    Image.new("1", (9000, 9000)).save(file)
    with pytest.raises(ValueError, match=r"z.png: [\d,]+ bytes announce 9000 x 9000 pixels"):
        read_picture(file, channels=3, height=8, width=8)
