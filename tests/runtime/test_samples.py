"""Files as users have them become what ``predict`` takes, or one clear message."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compress.cli.artifacts import _array
from compress.errors import CompressError, DataError, RunError
from compress.runtime import load, read_samples
from compress.runtime.manifest import Manifest, TensorSpec
from tests.export.programs import artifact, quantized

PIXELS = {"scale": 1 / 255, "mean": [0.5], "std": [0.25]}


def taking(*shape: int | None, preprocessing: dict[str, object] | None = PIXELS, inputs: int = 1) -> Manifest:
    specs = tuple(TensorSpec(f"x{i}", "float32", (None, *shape)) for i in range(inputs))
    return Manifest("net", "", "", specs, (), {}, preprocessing=preprocessing)


def read(path: Path, manifest: Manifest, *, resize: bool = False) -> tuple[list[str], np.ndarray]:
    batches = list(read_samples(path, manifest, resize=resize))
    assert all(len(batch.names) == len(batch.values) <= 32 for batch in batches)
    return [name for batch in batches for name in batch.names], np.concatenate([batch.values for batch in batches])


def picture(path: Path, width: int, height: int, mode: str = "RGB") -> np.ndarray:
    values = np.random.default_rng(width).integers(0, 256, (height, width, len(mode)), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.squeeze()).save(path)
    return values.transpose(2, 0, 1)


def test_a_folder_gives_all_images_in_order(tmp_path: Path) -> None:
    wanted = [picture(tmp_path / "cats" / f"{index:02}.png", 5, 4) for index in range(40)]
    wanted.append(picture(tmp_path / "dogs" / "a.PNG", 5, 4))
    (tmp_path / "cats" / "notes.txt").write_text("not an image")
    (tmp_path / "cats" / "._00.png").write_text("not one either")
    names, values = read(tmp_path, taking(3, 4, 5))
    assert (names[0], names[-1]) == ("cats/00.png", "dogs/a.PNG")
    assert values.dtype == np.uint8
    assert np.array_equal(values, wanted)


def test_images_become_grey_or_rgb(tmp_path: Path) -> None:
    grey = picture(tmp_path / "grey.png", 5, 4, "L")
    assert np.array_equal(read(tmp_path / "grey.png", taking(3, 4, 5))[1][0], np.repeat(grey, 3, 0))
    assert np.array_equal(read(tmp_path / "grey.png", taking(1, None, None))[1][0], grey)
    picture(tmp_path / "colour.png", 5, 4)
    assert read(tmp_path / "colour.png", taking(1, 4, 5))[1].shape == (1, 1, 4, 5)


def test_images_are_upright(tmp_path: Path) -> None:
    image, exif = Image.new("L", (5, 4)), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "a.png", exif=exif)
    assert read(tmp_path / "a.png", taking(1, 5, 4))[1].shape == (1, 1, 5, 4)


def test_images_are_brought_to_size_where_that_is_asked_for(tmp_path: Path) -> None:
    Image.new("RGB", (50, 40), (255, 128, 0)).save(tmp_path / "a.jpg", quality=100)
    values = read(tmp_path / "a.jpg", taking(3, 4, 5), resize=True)[1]
    assert values.shape == (1, 3, 4, 5)
    assert np.abs(values[0].mean((1, 2)) - [255, 128, 0]).max() < 3
    assert read(tmp_path / "a.jpg", taking(3, 40, 5), resize=True)[1].shape == (1, 3, 40, 5)


def test_an_image_is_predicted_as_its_array(tmp_path: Path) -> None:
    model = load(artifact(), engine="onnxruntime")
    model.manifest = replace(model.manifest, preprocessing=PIXELS)
    height, width = quantized().inputs.shape[2:]
    values = picture(tmp_path / "a.png", width, height, "L").astype(np.float32)
    (batch,) = read_samples(tmp_path / "a.png", model.manifest)
    inputs = ((values / 255 - 0.5) / 0.25)[None]
    wanted = np.exp(model(inputs))
    np.testing.assert_allclose(model.predict(batch.values)[1], wanted / wanted.sum(), rtol=1e-4)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (1, 3), (None, 1)])
@pytest.mark.parametrize("head", ["", "first,second,third\n", ",second,nano\n", "\n \n"])
def test_a_table_has_a_sample_in_each_line(shape: tuple[int | None, ...], head: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"{head}1,2.5,-3e2\n\n 4,5,6 \n")
    names, values = read(tmp_path / "a.csv", taking(*shape, preprocessing=None))
    assert names == ["0", "1"]
    assert values.shape == (2, *(size or 3 for size in shape))
    assert values.reshape(2, 3).tolist() == [[1, 2.5, -300], [4, 5, 6]]


def test_arrays_come_in_parts(tmp_path: Path) -> None:
    array = np.arange(200).reshape(100, 2)
    np.save(tmp_path / "a.npy", array)
    names, values = read(tmp_path / "a.npy", taking(2))
    assert names == [str(index) for index in range(100)]
    assert np.array_equal(values, array)


@pytest.mark.parametrize(
    ("name", "content", "manifest", "message"),
    [
        ("a.csv", "1,2\n3\n", taking(2), "a.csv, line 2: expected 2 numbers, got 1"),
        ("a.csv", "1,2\n3,x\n", taking(2), "a.csv, line 2: expected numbers between commas, got 'x'"),
        ("a.csv", ",0,1\n0,3,4\n", taking(2), "a.csv, line 1: expected numbers between commas, got ''"),
        ("a.csv", "1,nan\n", taking(2), "a.csv, line 1: expected numbers between commas, got 'nan'"),
        ("a.csv", "nan,nan\n1,2\n", taking(2), "a.csv, line 1: expected numbers between commas, got 'nan'"),
        ("a.csv", "inf,-inf\n1,2\n", taking(2), "a.csv, line 1: expected numbers between commas, got 'inf'"),
        ("a.csv", "a,b\n1,2\n,\n3,4\n", taking(2), "a.csv, line 3: expected numbers between commas, got ''"),
        ("a.csv", ", \n1,2\n", taking(2), "a.csv, line 1: expected numbers between commas, got ''"),
        ("a.csv", "a,b\n1_0,2\n", taking(2), "a.csv, line 2: expected numbers between commas, got '1_0'"),
        ("a.csv", "1_0,2_0\n", taking(2), "a.csv, line 1: expected numbers between commas, got '1_0'"),
        ("a.csv", "a,b\n", taking(2), "a.csv: expected a line of numbers for each sample, got none"),
        ("a.csv", "", taking(2), "a.csv: expected a line of numbers"),
        ("a.csv", b"\xff\xfe\x00", taking(2), "a.csv: expected text"),
        ("a.csv", "1,2\n", taking(1, 8, 8), "whose samples are rows of numbers, got an input of shape (N, 1, 8, 8)"),
        ("a.csv", "1,2\n", taking(2, inputs=2), "net: expected an artefact with one input, got 2 (x0, x1)"),
        ("a.npy", "1,2\n", taking(2), "a.npy: expected an array saved by numpy.save"),
        ("a.npy", "", taking(2), "a.npy: expected an array saved by numpy.save"),
        ("a.npy", "PK\3\4 and no more", taking(2), "a.npy: expected an array saved by numpy.save"),
        ("a.txt", "good\n", taking(2, inputs=2), "net: expected an artefact that holds a tokenizer, got none"),
        ("a.doc", "good\n", taking(2), "a.doc: expected one of .npy, .npz, .csv, .txt, .bmp"),
        ("a.png", "no image", taking(1, 4, 5), "a.png: expected an image, got cannot identify"),
        ("a.png", "", taking(5), "net: expected an input of shape (N, 1 or 3, H, W) for images, got (N, 5)"),
        ("a.png", "", taking(1, 4, 5, preprocessing=None), "net: expected preprocessing in the manifest"),
        ("a.png", "", taking(1, 4, 5, preprocessing=PIXELS | {"scale": 1 / 16}), "one that makes 62 of 255"),
        ("b/a.md", "", taking(1, 4, 5), "b: expected a folder with images"),
    ],
)
def test_what_cannot_be_read_is_named(
    name: str, content: str | bytes, manifest: Manifest, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CompressError) as caught:
        read(path.parent if "/" in name else path, manifest)
    assert message in str(caught.value)


def saved(save: Callable[..., None], array: np.ndarray) -> bytearray:
    buffer = io.BytesIO()
    save(buffer, array)
    return bytearray(buffer.getvalue())


def unclosed() -> bytearray:
    """Return an array whose header lacks the end of its shape."""
    return saved(np.save, np.ones((5, 6))).replace(b"(5, 6), }", b"(5, 6   (")


def zipped(place: int, value: int) -> bytearray:
    """Return an archive with another value at a place of its directory and, two bytes before, of the file's head."""
    content = saved(np.savez, np.ones((5, 6)))
    content[content.index(b"PK\1\2") + place] = content[place - 2] = value
    return content


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.npy", unclosed()),
        ("a.npy", saved(np.savez, np.ones((5, 6)))),
        ("a.npz", zipped(8, 1)),  # encrypted
        ("a.npz", zipped(10, 99)),  # compressed in a way that nobody knows
        ("a.npz", zipped(6, 200)),  # by a version of later days
        ("a.npz", saved(np.savez, np.ones((5, 6)))[:-30]),
    ],
)
def test_damaged_arrays_are_named(name: str, content: bytearray, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: expected (an array|arrays) saved by numpy\.save"):
        read(tmp_path / name, taking(6))
    with pytest.raises(RunError, match=rf"{name}: expected an array saved by numpy\.save"):
        _array(str(tmp_path / name))


def test_images_of_another_size_or_depth_are_named(tmp_path: Path) -> None:
    picture(tmp_path / "two" / "a.png", 5, 4)
    picture(tmp_path / "two" / "b.png", 6, 4)
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.zeros((4, 5), np.uint16)).save(tmp_path / "deep" / "c.png")
    for path, manifest, message in [
        (tmp_path / "two", taking(3, 4, 5), "b.png: expected 5×4 pixels, got 6×4. Say --resize"),
        (tmp_path / "two", taking(3, None, None), "b.png: expected the size of the image before, got 6×4"),
        (tmp_path / "deep", taking(1, 4, 5), "c.png: expected 8 bits a channel, got mode I;16"),
    ]:
        with pytest.raises(CompressError) as caught:
            read(path, manifest)
        assert message in str(caught.value)
