"""The page that a run, an evaluation and a sweep leave: read back by a parser of HTML, and held against the images."""

import base64
import io
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from fixefficientnet.data.dataset import ImageDataset, open_dataset
from fixefficientnet.data.names import Names
from fixefficientnet.evaluation import page
from fixefficientnet.evaluation.outcome import Evaluation
from fixefficientnet.evaluation.predictions import ImagePrediction, Predictions

HEADINGS = ("h1", "h2", "h3", "h4")
VOID = ("meta", "img", "wbr", "line", "circle", "polyline")


class Read(HTMLParser):
    """What a page holds: its tags with their attributes, its tables as rows of text, its headings, all its text."""

    def __init__(self, html: bytes):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.headings: list[tuple[str, str]] = []
        self.captions: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html.decode())
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag in HEADINGS:
            self.headings.append((tag, ""))
        elif tag == "figcaption":
            self.captions.append("")

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text += data
        if {"td", "th"} & {*self._open}:
            self.tables[-1][-1][-1] += data
        if {*HEADINGS} & {*self._open}:
            self.headings[-1] = (self.headings[-1][0], self.headings[-1][1] + data)
        if "figcaption" in self._open:
            self.captions[-1] += data

    def table(self, first: str) -> list[list[str]]:
        """The rows of the table whose first column has this title."""
        (found,) = (table[1:] for table in self.tables if table[0][0] == first and len(table) > 1)
        return found

    @property
    def images(self) -> dict[str | None, Image.Image]:
        """The thumbnails, by what is said of them."""
        found: dict[str | None, Image.Image] = {}
        for tag, attributes in self.tags:
            if tag == "img":
                kind, _, data = str(attributes["src"]).partition(",")
                assert kind == "data:image/jpeg;base64"
                image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
                assert (str(image.width), str(image.height)) == (attributes["width"], attributes["height"])
                found[attributes["alt"]] = image
        return found


def assert_stands_alone(found: Read) -> None:
    """It loads nothing and runs nothing, and its headings are in order."""
    assert not {tag for tag, _ in found.tags} & {"script", "link", "iframe", "object", "embed", "form", "base"}
    for _, attributes in found.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("src", "href") or str(value).startswith(("data:image/jpeg;base64,", "#")), value
            assert "url(" not in str(value)
    policies = [
        attributes["content"]
        for _, attributes in found.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert len(policies) == 1 and str(policies[0]).startswith("default-src 'none'; img-src data:;")
    anchors = {attributes["id"] for _, attributes in found.tags if "id" in attributes}
    assert {str(attributes["href"])[1:] for tag, attributes in found.tags if tag == "a"} <= anchors
    levels = [int(tag[1]) for tag, _ in found.headings]
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip([0, *levels], levels, strict=False))


def dataset_of(folder: Path, classes: Sequence[str], per_class: int) -> ImageDataset:
    for label, name in enumerate(classes):
        for index in range(per_class):
            tiny.draw(folder / name / f"{index}.jpg", label, index)
    return open_dataset(str(folder), None)


def evaluation_of(labels: Sequence[int], predicted: Sequence[int], confidences: Sequence[float], size: int = 32):
    images = zip(labels, predicted, confidences, strict=True)
    return Evaluation(size, 1.0, Predictions(ImagePrediction((a,), (b, a), c, 1.0) for a, b, c in images))


def drawn(dataset: ImageDataset, *evaluations: Evaluation, compared: bool = False) -> Read:
    rows = [page.Row(f"model {number}", one, dataset, "line") for number, one in enumerate(evaluations)]
    whole = page.Page("A title", ["About it."], rows, rows[-1:], (rows[0], rows[-1]) if compared else None)
    html = page.render(whole)
    assert html == page.render(whole)
    found = Read(html)
    assert_stands_alone(found)
    return found


def test_misclassified_images_are_shown_the_most_confident_first(tmp_path: Path):
    dataset = dataset_of(tmp_path, ("apple", "brick", "cloud"), 30)
    labels = [label for label in range(3) for _ in range(30)]
    generator = np.random.default_rng(0)
    predicted, confidences = generator.integers(0, 3, 90).tolist(), generator.uniform(0.4, 1, 90).tolist()
    found = drawn(dataset, evaluation_of(labels, predicted, confidences))
    wrong = sorted((i for i in range(90) if predicted[i] != labels[i]), key=lambda i: -confidences[i])
    assert len(wrong) > 48
    assert ("h3", f"Misclassified images: {len(wrong)}") in found.headings
    assert "the 48 most confident mistakes" in found.text
    assert [*found.images] == [dataset.image_name(index) for index in wrong[:48]]
    for index, image, caption in zip(wrong, found.images.values(), found.captions, strict=False):
        names = dataset.classes[predicted[index]], dataset.classes[labels[index]]
        assert caption.split()[:4] == [names[0], f"{100 * confidences[index]:.1f}%", "truth:", names[1]]
        original = dataset[index][0]
        assert image.size == original.size  # smaller than a thumbnail
        assert np.abs(np.asarray(image, float) - np.asarray(original, float)).mean() < 25


def test_thumbnails_are_small_upright_and_without_what_else_a_file_holds(tmp_path: Path):
    for number, name in enumerate(("apple", "brick")):
        pixels = np.zeros((600, 400, 3), np.uint8)
        pixels[:100, :, 0] = 255  # red on top
        exif = Image.Exif()
        exif[0x0112] = 6  # stored lying: to be turned by 90 degrees to the right
        (tmp_path / name).mkdir()
        stored = Image.fromarray(pixels).rotate(90, expand=True)
        stored.save(tmp_path / name / f"{number}.jpg", exif=exif, comment=b"a secret")
    dataset = open_dataset(str(tmp_path), None)
    wrong = evaluation_of([0, 1], [1, 0], [0.9, 0.8])
    for upright, size in ((True, (107, 160)), (False, (160, 107))):
        images = drawn(replace(dataset, upright=upright), wrong).images
        for image in images.values():
            assert image.size == size
            assert not image.getexif() and "comment" not in image.info
            red = np.asarray(image)[..., 0] > 128
            assert red[:20].all() == upright and red[:, :20].all() != upright


def test_an_image_that_is_gone_makes_room_for_the_next(tmp_path: Path):
    dataset = dataset_of(tmp_path, ("apple", "brick"), 3)
    found = evaluation_of([0, 0, 0, 1, 1, 1], [1, 1, 0, 1, 0, 1], [0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    (tmp_path / "apple" / "0.jpg").unlink()
    (tmp_path / "brick" / "1.jpg").write_bytes(b"no image")
    assert [*drawn(dataset, found).images] == ["apple/1.jpg"]


@pytest.mark.parametrize("count", [5, 20, 21])
def test_confused_classes(tmp_path: Path, count: int):
    names = [f"class{number:02}" for number in range(count)]
    dataset = dataset_of(tmp_path, names, 1)
    generator = np.random.default_rng(1)
    labels = [number for number in range(count) for _ in range(9)]
    predicted = [int(generator.integers(count)) if generator.random() < 0.5 else label for label in labels]
    paths = Names([[dataset.source.names[label] for label in labels]])
    dataset = replace(dataset, source=replace(dataset.source, names=paths, labels=dataset.source.labels[labels]))
    found = drawn(dataset, evaluation_of(labels, predicted, [0.5] * len(labels)))
    counts = Counter(zip(labels, predicted, strict=True))
    table = found.table("truth")
    if count <= 20:
        expected = [[names[a], *(str(counts[a, b] or "") for b in range(count))] for a in range(count)]
        assert table == expected
    else:
        pairs = sorted((-times, a, b) for (a, b), times in counts.items() if a != b)[:20]
        assert table == [[names[a], names[b], str(-times)] for times, a, b in pairs]
    classes = [row for table in found.tables if table[0][0] == "class" for row in table[1:]]
    right = {name: counts[number, number] / 9 for number, name in enumerate(names)}
    assert [row[0] for row in classes] == sorted(names, key=lambda name: (right[name], name))
    for name, images, top1, *_ in classes:
        assert (images, top1) == ("9", f"{100 * right[name]:.1f}")


def test_what_changed_between_two_evaluations(tmp_path: Path):
    dataset = dataset_of(tmp_path, ("apple", "brick"), 3)
    before = evaluation_of([0, 0, 0, 1, 1, 1], [1, 1, 0, 1, 0, 1], [0.9] * 6, size=32)
    after = evaluation_of([0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1], [0.5, 0.6, 0.7, 0.8, 0.9, 0.9], size=64)
    found = drawn(dataset, before, after, compared=True)
    assert ("h3", "Correct only now: 2 images") in found.headings
    assert ("h3", "Misclassified only now: 1 image") in found.headings
    assert [" ".join(text.split()) for text in found.captions[1:4]] == [
        "apple 60.0% before: brick apple/1.jpg",
        "apple 50.0% before: brick apple/0.jpg",
        "apple 80.0% truth: brick brick/0.jpg",
    ]
    assert [row[:3] for row in found.table("model")] == [["model 0", "32", "50.00"], ["model 1", "64", "66.67"]]
    # in the figure, an accuracy is as high as its marks say
    marks = {float(a["cx"] or 0): float(a["cy"] or 0) for tag, a in found.tags if tag == "circle"}
    (x1, y1), (x2, y2) = sorted(marks.items())
    assert x1 < x2 and y1 > y2


def test_names_are_text_whatever_they_hold(tmp_path: Path):
    names = ("<img src=x onerror=alert(1)>", "\"'><script>alert(2)<", "{{ 7 * 7 }} & **b**", "\x1b[31m\u202ered\nline")
    dataset = dataset_of(tmp_path, names, 1)
    first = next(tmp_path.glob("<img*")) / "0.jpg"
    first.rename(os.fsdecode(os.fsencode(first.parent) + b"/caf\xe9.jpg"))
    dataset = open_dataset(str(tmp_path), None)
    labels = [0, 1, 2, 3]
    found = drawn(dataset, evaluation_of(labels, [*labels[1:], 0], [0.9, 0.8, 0.7, 0.6]))
    shown = {*names[:3], "\\x1b[31m\\u202ered\\nline"}
    assert {row[0] for row in found.table("class")} == {row[0] for row in found.table("truth")} == shown
    assert "<img src=x onerror=alert(1)>/caf\\udce9.jpg" in found.images
    assert len(found.images) == 4


def test_several_labels_of_an_image(tmp_path: Path):
    dataset = dataset_of(tmp_path, ("apple", "brick", "cloud"), 1)
    found = drawn(dataset, evaluation_of([0, 1, 2], [2, 2, 0], [0.9, 0.8, 0.7]).relabelled([[0, 1], [2, 1], []]))
    assert not [table for table in found.tables if table[0][0] in ("class", "truth")]
    assert [" ".join(text.split()) for text in found.captions] == ["cloud 90.0% truth: apple or brick apple/0.jpg"]


def test_nothing_is_misclassified(tmp_path: Path):
    found = drawn(dataset_of(tmp_path, ("apple", "brick"), 1), evaluation_of([0, 1], [0, 1], [0.9, 0.9]))
    assert ("h3", "Misclassified images: 0") in found.headings
    assert found.images == {}
    assert "svg" not in [tag for tag, _ in found.tags]  # a figure of one point
