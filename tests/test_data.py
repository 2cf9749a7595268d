"""Datasets: what is opened, how its classes are numbered, and what a loader gives."""

import itertools
import multiprocessing
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor

from fixefficientnet.data.dataset import ImageDataset, follow, open_dataset
from fixefficientnet.data.loading import Ahead, InEveryEpoch, load_batches, shard_tasks
from fixefficientnet.data.names import Names, in_natural_order
from fixefficientnet.errors import DataError, ImageError
from fixefficientnet.preprocessing import FineTuningTransform, Preprocess, Views

# numbers of ImageNet-1k's classes, as published with Imagenette, and a few more
IMAGENET = {
    "n01440764": 0,
    "n02102040": 217,
    "n02124075": 285,
    "n02979186": 482,
    "n03000684": 491,
    "n03028079": 497,
    "n03394916": 566,
    "n03417042": 569,
    "n03425413": 571,
    "n03445777": 574,
    "n03888257": 701,
    "n07920052": 967,
    "n07932039": 969,
    "n15075141": 999,
}


def make_split(folder: Path, classes: list[str] | tuple[str, ...], count: int = 2) -> Path:
    for label, name in enumerate(classes):
        for index in range(count):
            tiny.draw(folder / name / f"{index}.jpg", label, index)
    return folder


def labels(images: ImageDataset) -> dict[str, set[int]]:
    """The class indices of the images of each folder."""
    found: dict[str, set[int]] = {}
    for index in range(len(images)):
        found.setdefault(Path(images.image_name(index)).parent.name, set()).add(images[index][1])
    return found


# --- classes ------------------------------------------------------------------------------------------------


def test_wordnet_ids_get_imagenets_numbers_whichever_are_missing(tmp_path: Path):
    for number, ids in enumerate((list(IMAGENET), list(IMAGENET)[::3], ["n07920052"])):
        make_split(tmp_path / str(number) / "train", ids)
        images = open_dataset(str(tmp_path / str(number)), "train", num_classes=1000)
        assert labels(images) == {name: {IMAGENET[name]} for name in ids}
        assert len(images.classes) == 1000
        assert {name: images.classes.index(name) for name in IMAGENET} == IMAGENET


def test_wordnet_ids_keep_their_own_numbers_for_a_network_of_as_many_classes(tmp_path: Path):
    make_split(tmp_path / "train", list(IMAGENET)[::4])
    for num_classes in (None, 4):
        images = open_dataset(str(tmp_path), "train", num_classes=num_classes)
        assert labels(images) == {name: {index} for index, name in enumerate(list(IMAGENET)[::4])}


def test_unknown_wordnet_ids_are_named(tmp_path: Path):
    make_split(tmp_path / "train", ["n01440764", "n00000001", "n99999999"])
    with pytest.raises(DataError, match="none of ImageNet-1k's: n00000001, n99999999"):
        open_dataset(str(tmp_path), "train", num_classes=1000)


def test_other_classes_are_numbered_in_sorted_order(tmp_path: Path):
    make_split(tmp_path / "train", ("cloud", "apple", "brick"))
    for num_classes in (None, 3):
        images = open_dataset(str(tmp_path), "train", num_classes=num_classes)
        assert images.classes == ("apple", "brick", "cloud")
        assert labels(images) == {"apple": {0}, "brick": {1}, "cloud": {2}}


@pytest.mark.parametrize("num_classes", [2, 5, 1000])
def test_another_number_of_classes_than_the_networks_is_refused(tmp_path: Path, num_classes: int):
    make_split(tmp_path / "train", tiny.CLASSES)
    with pytest.raises(DataError, match=f"train has 3 classes, the model has {num_classes}") as error:
        open_dataset(str(tmp_path), "train", num_classes=num_classes)
    assert "--stage base" in str(error.value)


def test_an_empty_class_is_named(tmp_path: Path):
    make_split(tmp_path / "train", tiny.CLASSES)
    (tmp_path / "train" / "beech").mkdir()
    (tmp_path / "train" / "beech" / "notes.txt").write_text("none yet")
    with pytest.raises(DataError, match=r"The class beech has no images in .*beech"):
        open_dataset(str(tmp_path), "train")


def test_the_validation_split_follows_the_training_splits_numbers(tmp_path: Path):
    make_split(tmp_path / "train", ("apple", "brick", "cloud", "dune"))
    make_split(tmp_path / "val", ("brick", "dune"))
    train, validation = (open_dataset(str(tmp_path), split) for split in ("train", "validation"))
    assert labels(validation) == {"brick": {0}, "dune": {1}}
    assert labels(follow(validation, train.classes, train.name)) == {"brick": {1}, "dune": {3}}
    assert follow(validation, train.classes, train.name).classes == train.classes
    assert labels(follow(train, train.classes, train.name)) == {"apple": {0}, "brick": {1}, "cloud": {2}, "dune": {3}}


def test_classes_that_were_never_trained_are_refused_in_validation(tmp_path: Path):
    make_split(tmp_path / "train", ("apple", "brick"))
    make_split(tmp_path / "val", ("apple", "cloud", "dune"))
    train, validation = (open_dataset(str(tmp_path), split) for split in ("train", "validation"))
    with pytest.raises(DataError, match=r"val has classes that .*train lacks: cloud, dune\."):
        follow(validation, train.classes, train.name)


# --- where the images are ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "name"),
    [
        ("train", "train"),
        ("train", "training"),
        ("validation", "val"),
        ("validation", "valid"),
        ("validation", "validation"),
        ("test", "test"),
    ],
)
def test_a_split_is_found_by_any_of_its_names(tmp_path: Path, split: str, name: str):
    make_split(tmp_path / "data" / name, tiny.CLASSES)
    make_split(tmp_path / "data" / "other", ("apple",))
    images = open_dataset(str(tmp_path / "data"), split)
    assert len(images) == 6
    assert images.name == str(tmp_path / "data" / name)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_missing_split_says_what_is_there(tmp_path: Path, split: str):
    make_split(tmp_path / "pears", ("green",))
    make_split(tmp_path / "plums", ("blue",))
    expected = {"train": "train/", "validation": "val/", "test": "test/"}[split]
    with pytest.raises(DataError, match=rf"has no folder {expected}.* It has: pears, plums\."):
        open_dataset(str(tmp_path), split)


def test_a_folder_of_classes_alone_is_split_the_same_each_time(tmp_path: Path):
    for label, (name, count) in enumerate({"apple": 20, "brick": 2, "cloud": 13}.items()):
        for index in range(count):
            tiny.draw(tmp_path / "data" / name / f"{index}.jpg", label, index)
    shutil.copytree(tmp_path / "data", tmp_path / "elsewhere")

    def names(folder: str, split: str) -> list[str]:
        images = open_dataset(str(tmp_path / folder), split)
        assert f"automatic {'train' if split == 'train' else 'validation'} split" in images.name
        assert images.classes == tiny.CLASSES
        return [images.image_name(index) for index in range(len(images))]

    train, validation = names("data", "train"), names("data", "validation")
    assert sorted(train + validation) == sorted(names_of(tmp_path / "data"))
    assert (names("elsewhere", "train"), names("elsewhere", "validation")) == (train, validation)
    fifth = {name for name in train + validation if sha256(name.encode()).digest() < bytes([51] * 32)}  # 0x33… is 0.2
    for name, count in (("apple", 20), ("cloud", 13)):
        assert {image for image in validation if image.startswith(name)} == {i for i in fifth if i.startswith(name)}
        assert 0 < sum(image.startswith(name) for image in validation) < count
    assert sum(image.startswith("brick") for image in validation) == 1  # at least one each
    assert sum(image.startswith("brick") for image in train) == 1
    for index in range(20, 40):  # further images move no other one
        tiny.draw(tmp_path / "elsewhere" / "apple" / f"{index}.jpg", 0, index)
    assert set(train) <= set(names("elsewhere", "train"))
    assert set(validation) <= set(names("elsewhere", "validation"))
    assert names("data", "val") == validation
    assert len(open_dataset(str(tmp_path / "data"), None)) == 35  # for evaluation, all of it
    (tmp_path / "data" / "brick" / "0.jpg").unlink()
    with pytest.raises(DataError, match="its class brick has one image"):
        open_dataset(str(tmp_path / "data"), "train")


def names_of(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*.jpg")]


def test_a_folder_without_anything_in_it_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="no folder at all"):
        open_dataset(str(tmp_path), "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="train holds no images"):
        open_dataset(str(tmp_path), "train")


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"There is no folder .*nowhere"):
        open_dataset(str(tmp_path / "nowhere"), "train")


def test_what_is_only_a_stream_is_refused():
    with pytest.raises(DataError, match=r"tfds/x is .*a stream"):
        open_dataset("tfds/x", "train")


def test_tar_files_that_are_not_there_are_refused():
    with pytest.raises(DataError, match="nowhere"):
        open_dataset("wds/nowhere", "train")


@pytest.mark.parametrize("name", ["hfds/organisation/x", "hfids/organisation/x"])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
    with pytest.raises(DataError, match=r"organisation/x needs another package: .*pip install datasets"):
        open_dataset(name, "train")


def make_mnist(root: Path, counts: dict[str, int]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """torchvision's MNIST of random pixels, in the format of yann.lecun.com/exdb/mnist."""
    folder, made = root / "MNIST" / "raw", {}
    folder.mkdir(parents=True)
    for seed, (name, count) in enumerate(counts.items()):
        generator = np.random.default_rng(seed)
        pixels = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        classes = generator.integers(0, 10, count, dtype=np.uint8)
        made[name] = pixels, classes
        (folder / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, count, 28, 28) + pixels.tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, count) + classes.tobytes())
    return made


def test_torchvisions_data_sets(tmp_path: Path):
    made = make_mnist(tmp_path, {"train": 7, "t10k": 4})
    for split, name in (("train", "train"), ("validation", "t10k")):
        images = open_dataset("torch/mnist", split, root=str(tmp_path), num_classes=10)
        assert len(images) == len(made[name][0])
        assert [name[0] for name in images.classes] == list("0123456789")
        for index, (pixels, label) in enumerate(zip(*made[name], strict=True)):
            image, found = images[index]
            assert found == label
            assert np.array_equal(np.asarray(image), np.repeat(pixels[..., None], 3, axis=2))
        assert images.image_name(3) == f"image 3 of torch/mnist ({split})"
    with pytest.raises(DataError, match="has 10 classes, the model has 1000"):
        open_dataset("torch/mnist", "train", root=str(tmp_path), num_classes=1000)


@pytest.mark.parametrize("name", ["torch/mnist", "torch/cifar10", "torch/no_such_set"])
def test_torchvisions_data_sets_that_are_not_there_are_refused(tmp_path: Path, name: str):
    with pytest.raises(DataError, match=rf"{name} \(train\) cannot be opened"):
        open_dataset(name, "train", root=str(tmp_path))


def test_the_fingerprint_tells_whether_the_data_set_is_the_same(tmp_path: Path):
    def fingerprint(folder: Path) -> str:
        return open_dataset(str(folder), "train").fingerprint()

    folder = tmp_path / "data"
    make_split(folder / "train", tiny.CLASSES)
    shutil.copytree(folder, tmp_path / "copy")
    found = {fingerprint(folder)}
    assert found == {fingerprint(folder), fingerprint(tmp_path / "copy")}
    tiny.draw(folder / "train" / "brick" / "2.jpg", 1, 2)
    found.add(fingerprint(folder))
    (folder / "train" / "brick" / "2.jpg").rename(folder / "train" / "brick" / "3.jpg")
    found.add(fingerprint(folder))
    (folder / "train" / "brick").rename(folder / "train" / "cliff")
    found.add(fingerprint(folder))
    (folder / "train" / "cliff" / "0.jpg").rename(folder / "train" / "apple" / "9.jpg")
    found.add(fingerprint(folder))
    assert len(found) == 5


# --- loading ------------------------------------------------------------------------------------------------


def small(image: Image.Image, epoch: int, index: int) -> torch.Tensor:
    """The image in little, with what it was asked for as."""
    return torch.cat([pil_to_tensor(image.resize((8, 8))).flatten().float(), torch.tensor([epoch, index]).float()])


@pytest.fixture
def twelve(tmp_path: Path) -> Path:
    return make_split(tmp_path / "data" / "train", tiny.CLASSES, 4).parent


def files(folder: Path) -> list[Path]:
    """In the dataset's order, as the single digits here sort."""
    return sorted((folder / "train").rglob("*.jpg"))


def test_a_image_is_the_file_as_rgb(twelve: Path):
    paths = files(twelve)
    Image.new("L", (5, 7), 99).save(paths[5])
    images = open_dataset(str(twelve), "train")
    for index, path in enumerate(paths):
        image, label = images[index]
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(path).convert("RGB")))
        assert tiny.CLASSES[label] == path.parent.name
        assert images.image_name(index) == str(path.relative_to(twelve / "train"))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_as_asked_for(twelve: Path, workers: int):
    generator = np.random.default_rng(workers)
    tasks = [[(epoch, int(index)) for index in generator.permutation(12)] for epoch in range(3)]
    batches = [part for line in tasks for part in (line[:5], line[5:6], line[6:])]
    paths, images = files(twelve), open_dataset(str(twelve), "train")
    found = list(load_batches(images, small, iter(batches), workers=workers))
    assert len(found) == len(batches)
    for batch, asked in zip(found, batches, strict=True):
        expected = [small(Image.open(paths[index]).convert("RGB"), epoch, index) for epoch, index in asked]
        assert torch.equal(batch.inputs, torch.stack(expected))
        assert batch.indices.tolist() == [index for _, index in asked]
        assert batch.targets.tolist() == [tiny.CLASSES.index(paths[index].parent.name) for _, index in asked]
        assert batch.unreadable == []


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("views", [None, 3])
def test_pixels_are_shipped_and_become_the_networks_input_without_a_copy(twelve: Path, views: int | None, workers: int):
    test = Preprocess(16, 0.875, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    augmented = FineTuningTransform(test, 0, 0.5, 0.05)
    transform = InEveryEpoch(test.pixels) if views is None else Views(views, augmented)
    tasks = [[(0, index) for index in range(start, start + 4)] for start in (0, 4, 8)]
    paths = files(twelve)
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize(test.mean, test.std)])
    for batch, asked in zip(
        load_batches(open_dataset(str(twelve), "train"), transform, tasks, workers=workers), tasks, strict=True
    ):
        assert batch.inputs.dtype == torch.uint8
        assert batch.inputs.movedim(-3, -1).is_contiguous()
        found = test.normalise(batch.inputs.flatten(0, -4))
        assert found.is_contiguous(memory_format=torch.channels_last)
        plain = [reference(test.crop(Image.open(paths[index]).convert("RGB"))) for _, index in asked]
        expected = torch.stack(plain).contiguous(memory_format=torch.channels_last)
        assert torch.equal(found[:: views or 1], expected)
        if views:
            assert torch.equal(found[1::views], expected.flip(-1))


def test_what_is_loaded_ahead_has_a_limit():
    for workers, batch, room in itertools.product((1, 2, 7, 64), (1, 2, 32, 512, 4096), (1, 2, 3, 63, 64, 500, 10_000)):
        ahead = Ahead.of(workers, batch, room)
        assert ahead.workers * ahead.part * ahead.parts <= room
        assert ahead.workers == min(workers, room)
        assert 1 <= ahead.part <= batch
        assert ahead.parts >= (2 if room >= 2 * workers else 1)
        if room >= 2 * max(batch, 64 * workers):
            assert ahead.workers * ahead.part * ahead.parts >= batch  # while a batch is computed, the next is loaded


def small_shared_memory(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))


@pytest.mark.skipif(sys.platform != "linux", reason="shared memory is a folder")
@pytest.mark.parametrize("images", [1, 2, 8, 17])
def test_with_little_shared_memory_batches_come_in_small_parts(
    twelve: Path, images: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    for index in (3, 6, 7):
        files(twelve)[index].write_bytes(b"no image")
    dataset = open_dataset(str(twelve), "train")
    tasks = [[(1, index) for index in part] for part in ([0, 1, 2, 3, 4, 5, 6], [7, 8], [6, 7], [9, 10, 11, 0, 1])]
    expected = list(load_batches(dataset, small, tasks))
    small_shared_memory(monkeypatch, 2 * images * small(Image.new("RGB", (9, 9)), 0, 0).nbytes)
    found = list(load_batches(dataset, small, tasks, workers=2))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.targets, other.targets)
        assert torch.equal(one.indices, other.indices)
        assert one.unreadable == other.unreadable
    said = "1 loading processes instead of 2. /dev/shm has 0.0 MB free."
    assert (said in caplog.text) == (images == 1)


@pytest.mark.skipif(sys.platform != "linux", reason="shared memory is a folder")
def test_too_little_shared_memory_is_an_error_that_says_what_to_do(twelve: Path, monkeypatch: pytest.MonkeyPatch):
    dataset = open_dataset(str(twelve), "train")

    def transform(image: Image.Image, epoch: int, index: int) -> torch.Tensor:
        return torch.zeros(3, 1000, 1000, dtype=torch.uint8)

    remedy = r"/dev/shm has 5\.0 MB free\. Give it more \(docker run --shm-size 2g\), or .* without processes \(-j 0\)"
    small_shared_memory(monkeypatch, 5_000_000)
    with pytest.raises(DataError, match=rf"shared memory, of 3\.0 MB per image\. {remedy}"):
        next(load_batches(dataset, transform, [[(0, 0)]], workers=1))
    small_shared_memory(monkeypatch, 7_000_000)

    def full(tensor: torch.Tensor) -> None:  # as torch says it, by then
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(DataError, match=r"ran out of shared memory\. /dev/shm has 7\.0 MB free") as held:
        next(load_batches(dataset, transform, [[(0, 0)]], workers=1))
    assert held.value and not multiprocessing.active_children()


def test_an_unreadable_image_is_named(twelve: Path):
    images, paths = open_dataset(str(twelve), "train"), files(twelve)
    paths[2].write_bytes(b"no image")
    paths[4].write_bytes(paths[4].read_bytes()[:300])
    paths[7].unlink()
    paths[8].write_bytes(b"")
    for index in (2, 4, 7, 8):
        with pytest.raises(ImageError, match=f"{paths[index].parent.name}/{paths[index].name}"):
            images[index]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_readable_image_takes_the_place_of_unreadable_ones(twelve: Path, workers: int):
    for index in (3, 4, 11):
        files(twelve)[index].write_bytes(b"no image")
    images = open_dataset(str(twelve), "train")
    tasks = [[(7, 2), (7, 3), (7, 4)], [(7, 11), (7, 10)]]
    first, second = load_batches(images, small, tasks, workers=workers, substitute=True)
    assert first.indices.tolist() == [2, 5, 5]
    assert first.targets.tolist() == [0, 1, 1]
    assert first.inputs[:, -2:].tolist() == [[7, 2], [7, 5], [7, 5]]
    assert torch.equal(first.inputs[1], small(images[5][0], 7, 5))
    assert [index for index, _ in first.unreadable] == [3, 4, 4]
    assert ["apple/3.jpg" in reason or "brick/0.jpg" in reason for _, reason in first.unreadable] == [True] * 3
    assert second.indices.tolist() == [0, 10]  # from the last one on to the first
    assert second.targets.tolist() == [0, 2]
    assert [index for index, _ in second.unreadable] == [11]
    assert "cloud/3.jpg" in second.unreadable[0][1]


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_left_out_where_nothing_takes_their_place(twelve: Path, workers: int):
    for index in (3, 4):
        files(twelve)[index].write_bytes(b"no image")
    images = open_dataset(str(twelve), "train")
    tasks = [[(0, 2), (0, 3), (0, 5)], [(0, 4), (0, 3)], [(0, 11)]]
    first, second, third = load_batches(images, small, tasks, workers=workers)
    assert first.indices.tolist() == [2, 5]
    assert first.targets.tolist() == [0, 1]
    assert torch.equal(first.inputs, torch.stack([small(images[index][0], 0, index) for index in (2, 5)]))
    assert [index for index, _ in first.unreadable] == [3]
    assert "apple/3.jpg" in first.unreadable[0][1]
    assert (len(second.inputs), len(second.targets), len(second.indices)) == (0, 0, 0)
    assert [index for index, _ in second.unreadable] == [4, 3]
    assert third.indices.tolist() == [11]


def test_where_nothing_is_readable_the_search_for_another_ends(twelve: Path):
    for path in files(twelve):
        path.write_bytes(b"no image")
    (batch,) = load_batches(open_dataset(str(twelve), "train"), small, [[(0, 5)]], substitute=True)
    assert len(batch.targets) == 0
    assert [index for index, _ in batch.unreadable] == [5, 6, 7, 8, 9, 10, 11, 0, 1, 2]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shards_hold_every_image_once_and_no_batch_is_in_two(world: int):
    for length in (1, 7, 8, 63, 64, 65, 300):
        for shard in (1, 8, 64, 1000):
            for batch in (1, 3, 8, 100):
                numbers = range(-(-length // shard))
                parts = [[*shard_tasks(length, shard, batch, numbers[rank::world])] for rank in range(world)]
                tasks = [task for part in parts for task in part]
                assert sorted(index for task in tasks for _, index in task) == list(range(length))
                assert all(0 < len(task) <= batch for task in tasks)
                assert all(epoch == 0 for task in tasks for epoch, _ in task)
                assert all(len({index // shard for _, index in task}) == 1 for task in tasks)
                # as few batches as there can be
                sizes = [min(shard, length - number * shard) for number in numbers]
                assert len(tasks) == sum(-(-size // batch) for size in sizes)


def test_images_in_no_class_are_named(tmp_path: Path):
    for name in ("cover.jpg", "brick/more/c.jpg", "brick/more/still/c.WEBP"):
        place = tmp_path / name.replace("/", "-")
        make_split(place / "train", tiny.CLASSES)
        tiny.draw(place / "train" / name, 0, 0)
        with pytest.raises(DataError, match=f"{name} is in no class's folder"):
            open_dataset(str(place), "train")


@pytest.mark.newest
@pytest.mark.parametrize("seed", ["1", "2"])
def test_names_that_differ_in_case_or_zeros_alone_have_an_order(tmp_path: Path, seed: str):
    make_split(tmp_path / "train", ("7", "07", "Fox", "fox", "10"), 1)
    code = (  # without timm, which takes most of the time to import
        "import sys; from pathlib import Path; from fixefficientnet.data.folders import open_classes; "
        "print(open_classes(Path(sys.argv[1])).classes)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "train"],
        env=os.environ | {"PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "('07', '7', '10', 'Fox', 'fox')"


def naturally(name: str) -> tuple[list[str | int], str]:
    """The natural order, as plainly as can be."""
    parts: list[str | int] = [*re.split(r"(\d+)", name.lower())]
    parts[1::2] = map(int, parts[1::2])
    return parts, name


def test_a_million_names_have_the_natural_order(tmp_path: Path):
    """Names of all shapes: numbers of other lengths and scripts, zeros before them, case, text that looks alike."""
    generator = np.random.default_rng(0)

    def text(signs: str, most: int) -> str:
        return "".join(generator.choice([*signs], generator.integers(1, most)))

    for signs in ("aA01", "0123456789ab.", "a\u03a3\u03c3\u03c2\u06631", "\u00e9-_ .09", "01", "K\u212a1\u0130i", "9"):
        for _ in range(100):
            before, after = text(signs, 4), text(signs, 4)
            numbers = [text(generator.choice([signs, "0123456789"]), 5) for _ in range(generator.integers(1, 9))]
            names = [f"{before}{number}{after if generator.random() < 0.95 else ''}" for number in numbers]
            assert in_natural_order(names) == sorted(names, key=naturally)
            assert (
                [*Names.of(names)] == names == [Names([names[:3], [], names[3:]])[index] for index in range(len(names))]
            )
    for name in ("n1_9", "n1_10", "n01", "n1", "N1", "n1-", "n10", "1", "01"):
        for image in ("x1.jpg", "x10.jpg", "x9.jpg", "x09.JPG", "X9.jpg", "y.png", "1.jpg"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / image).touch()
    images = open_dataset(str(tmp_path), None)
    found = [images.image_name(index) for index in range(len(images))]
    assert found == sorted((path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*")), key=naturally)
    assert images.classes == tuple(sorted((path.name for path in tmp_path.iterdir()), key=naturally))
    for copy in (images, pickle.loads(pickle.dumps(images))):
        labels = [copy.source[index][1] for index in range(len(copy))]
        assert [copy.class_name(label) for label in labels] == [name.partition("/")[0] for name in found]
        assert [copy.image_path(index) for index in range(len(copy))] == [str(tmp_path / name) for name in found]


def test_a_named_data_set_that_needs_a_folder_asks_for_it():
    with pytest.raises(DataError, match="--data-root"):
        open_dataset("torch/mnist", "train")
