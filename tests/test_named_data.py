"""Datasets by name, each written by its own library."""

import json
from pathlib import Path

import datasets
import pytest
import timm
import tiny
import webdataset
from torchvision.transforms.functional import pil_to_tensor

from fixefficientnet.data.dataset import ImageDataset, open_dataset
from fixefficientnet.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_data(tmp_path_factory.mktemp("data"), train=4, val=2)


def write_shards(images: ImageDataset, place: Path, split: str, shards: int = 3) -> list[str]:
    place.mkdir(exist_ok=True)
    names = [f"tiny-{split}-{number:04d}.tar" for number in range(shards)]
    for number, name in enumerate(names):
        with webdataset.TarWriter(str(place / name)) as writer:
            for index in range(number, len(images), shards):
                path = Path(images.name, images.image_name(index))
                key = f"{path.parent.name}_{path.stem}"
                label = {"cls": str(images[index][1])} if index % 2 else {"json": {"label": images[index][1]}}
                writer.write({"__key__": key, "jpg": path.read_bytes(), **label})
    return names


def same(one: ImageDataset, other: ImageDataset) -> bool:
    def content(images: ImageDataset) -> list[tuple[int, bytes]]:
        rows = (images[index] for index in range(len(images)))
        return sorted((label, pil_to_tensor(image).numpy().tobytes()) for image, label in rows)

    return content(one) == content(other)


@pytest.mark.parametrize("listed", [True, False])
def test_wds(folder: Path, tmp_path: Path, listed: bool):
    plain = {split: open_dataset(str(folder), split) for split in ("train", "validation")}
    splits = {
        name: write_shards(plain[split], tmp_path, name) for split, name in (("train", "train"), ("validation", "val"))
    }
    if listed:
        record = {"splits": {name: {"filenames": files} for name, files in splits.items()}}
        (tmp_path / "_info.json").write_text(json.dumps(record))
    for split, images in plain.items():
        for found in (
            open_dataset("wds/tiny", split, root=str(tmp_path)),
            open_dataset(f"wds/{tmp_path}", split, num_classes=3),
        ):
            assert same(found, images)
            assert found.image_path(0) == found.image_name(0)
            assert found.image_name(0).startswith("tiny-")
            assert found.classes == ("0", "1", "2")
            assert found.fingerprint() != images.fingerprint()


def test_wds_that_cannot_be_used(folder: Path, tmp_path: Path):
    with pytest.raises(DataError, match="There is no folder nowhere of tar files"):
        open_dataset("wds/nowhere", "train")
    with pytest.raises(DataError, match="no tar files of a split 'train'"):
        open_dataset("wds/x", "train", root=str(tmp_path))
    outside = tmp_path / "inside"
    outside.mkdir()
    (outside / "_info.json").write_text(json.dumps({"splits": {"train": {"filenames": ["../a.tar"]}}}))
    with pytest.raises(DataError, match="outside of its folder"):
        open_dataset("wds/x", "train", root=str(outside))
    (outside / "_info.json").write_text("{}")
    with pytest.raises(DataError, match="is damaged"):
        open_dataset("wds/x", "train", root=str(outside))
    (outside / "_info.json").unlink()
    (name,) = write_shards(open_dataset(str(folder), "train"), outside, "train", shards=1)
    with pytest.raises(DataError, match="has 3 classes, the model has 5"):
        open_dataset("wds/x", "train", root=str(outside), num_classes=5)
    whole = (outside / name).read_bytes()
    (outside / name).write_bytes(whole[:3000])
    with pytest.raises(DataError, match=name):
        open_dataset("wds/x", "train", root=str(outside))
    with webdataset.TarWriter(str(outside / name)) as writer:
        writer.write({"__key__": "lonely", "jpg": b"an image without a class"})
    with pytest.raises(DataError, match="lonely has an image or a class, but not both"):
        open_dataset("wds/x", "train", root=str(outside))


@pytest.mark.parametrize("kind", ["hfds", "hfids"])
def test_hugging_face_datasets(folder: Path, tmp_path: Path, kind: str):
    datasets.disable_progress_bars()
    for split, name in (("train", "train"), ("validation", "val")):
        found = open_dataset(f"{kind}/{folder}", split, root=str(tmp_path), num_classes=3)
        plain = open_dataset(str(folder), split)
        assert same(found, plain), name
        assert found.classes == tiny.CLASSES


def test_other_images_of_the_same_number_and_classes_have_another_fingerprint(folder: Path, tmp_path: Path):
    other = tmp_path / "other"
    for label, name in enumerate(tiny.CLASSES):
        for index in range(4):
            tiny.draw(other / "train" / name / f"{index}.jpg", label, 50 + index)
    one, two = (open_dataset(f"hfds/{place}", "train", root=str(tmp_path)) for place in (folder, other))
    assert (len(one), one.classes) == (len(two), two.classes)
    assert one.fingerprint() != two.fingerprint()
    assert one.fingerprint() == open_dataset(f"hfds/{folder}", "train", root=str(tmp_path)).fingerprint()


def test_torchvision_data_sets(tmp_path: Path):
    with pytest.raises(DataError, match=r"torch/cifar10 \(train\) cannot be opened"):
        open_dataset("torch/cifar10", "train", root=str(tmp_path))
    images = tiny.make_data(tmp_path / "data", train=2, val=1)
    found = open_dataset("torch/image_folder", "train", root=str(images))
    assert same(found, open_dataset(str(images), "train"))
    assert found.classes == tiny.CLASSES
    reference = timm.data.create_dataset("torch/image_folder", root=str(images), split="train")
    assert [found[index][1] for index in range(6)] == [label for _, label in reference]


def test_streams_without_files_are_refused():
    with pytest.raises(DataError, match="tfds/cats is a stream"):
        open_dataset("tfds/cats", "train")
