"""Files that tell the classes of images: CSV of file and label, and what comes with ImageNet's validation images.

What is refused is a DataError.
"""

import csv
import posixpath
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from fixefficientnet._internal.checkpoint_file import listed
from fixefficientnet._internal.files import check_file
from fixefficientnet.errors import DataError

_FILE = {"file", "filename", "file_name", "image", "image_id", "imageid", "id", "name", "path"}
_LABEL = {"label", "labels", "class", "class_name", "category", "target", "synset", "wnid", "predictionstring"}
"""What columns are called in a header, in any case."""
_BOXES = re.compile(r"(n\d{8})( \d+){4}.*")
"""A label of ImageNet's with boxes, as in LOC_val_solution.csv."""
_LONGEST_LINE = 2**16
"""Most letters of a line: an image, its label, and what else a table tells."""
_LONGEST = 255
"""Most letters of a label: as many as a folder's name may have."""


def lines(file: Path) -> list[str]:
    """The lines of a text file, with the bytes that are no UTF-8 as file names have them."""
    try:
        check_file(file)
        text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}.") from error
    if "\0" in text:
        raise DataError(f"{file} is no text file in UTF-8.")
    return text.split("\n")


def normal(name: str) -> str:
    """A path in a file as paths are compared: with slashes, and without ./ before it."""
    return posixpath.normpath(name.strip().replace("\\", "/"))


def read(file: Path, folder: Path, images: Sequence[str], others: Sequence[str] = ()) -> dict[str, str]:
    """Reads the label of each image, by its path in the folder, with slashes.

    The file has an image and its label in each line, separated by a tab, comma, semicolon or space; a header may name
    the columns. The image is its path in the folder, the ending of which may be missing. A file of labels alone is of
    ImageNet's validation images, which bear their numbers: WordNet ids, or the numbers of ILSVRC2012's devkit, whose
    meta.mat must be beside it. It must label all of these images, and may label some of the others, which get none.
    """
    rows = _rows(file)
    find = _finder(folder, [*images, *others])
    found: dict[str, str] = {}
    missing, twice = [], []
    for name, label in rows:
        path = find(name)
        if path is None:
            missing.append(name)
        elif path in found:
            twice.append(path)
        elif label:
            found[path] = label
    bare = [path for path in images if path not in found]
    wrong = {"labels of files that are not there": missing, "images without a label": bare, "second labels": twice}
    if said := "; ".join(f"{len(names):,} {what}: {listed(names)}" for what, names in wrong.items() if names):
        raise DataError(
            f"{file} does not fit the images of {folder}. {said}. Paths begin in that folder; --exclude leaves images "
            "out."
        )
    return {path: found[path] for path in images}


def _finder(folder: Path, paths: Sequence[str]) -> Callable[[str], str | None]:
    """What finds the path of an image by what a file calls it; None: there is no such image, or more than one."""
    known = {path: path for path in paths}
    stems: dict[str, list[str]] = {}
    for path in paths:
        stems.setdefault(posixpath.splitext(path)[0], []).append(path)
    known = {stem: same[0] for stem, same in stems.items() if len(same) == 1} | known
    beginnings = ("", f"{folder.as_posix()}/", f"{folder.name}/")

    def find(name: str) -> str | None:
        if name in known:
            return known[name]
        plain = normal(name)
        return next((known[short] for one in beginnings if (short := plain.removeprefix(one)) in known), None)

    return find


def _rows(file: Path) -> list[tuple[str, str]]:
    """Image and label of each line."""
    text = [line for line in lines(file) if line.strip()]
    if not text:
        raise DataError(f"{file} holds no labels.")
    if (longest := max(map(len, text))) > _LONGEST_LINE:
        raise DataError(f"{file} has a line of {longest:,} letters.")
    if all(re.fullmatch(r"n\d{8}|\d+", line.strip()) for line in text):
        return _of_imagenet(file, [line.strip() for line in text])
    separator = next((sign for sign in "\t,;" if sign in text[0]), None)
    try:
        rows = [*csv.reader(text, delimiter=separator)] if separator else [line.rsplit(None, 1) for line in text]
    except csv.Error as error:
        raise DataError(f"{file} is no CSV: {error}.") from error
    name, label, width = 0, 1, 2
    header = [cell.strip().lower() for cell in rows[0]]
    if _FILE & {*header}:
        name = next(index for index, cell in enumerate(header) if cell in _FILE)
        others = [index for index in range(len(header)) if index != name]
        label = next((i for i in others if header[i] in _LABEL), others[0] if len(others) == 1 else -1)
        if label < 0:
            raise DataError(f"{file} has no column named label: it has {', '.join(rows[0])}.")
        width = len(header)
        del rows[0]
    for number, row in enumerate(rows, 1):
        if len(row) != width:
            shown = (separator or " ").join(row)
            raise DataError(f"{file} takes an image and its label in each line; row {number} is {shown!r}.")
    found = [(row[name], _BOXES.sub(r"\1", row[label].strip())) for row in rows]
    if (longest := max((len(label) for _, label in found), default=0)) > _LONGEST:
        raise DataError(f"{file} has a label of {longest:,} letters.")
    return found


def _of_imagenet(file: Path, labels: list[str]) -> list[tuple[str, str]]:
    """Names and labels of ImageNet's validation images, of labels in the order of their numbers."""
    if labels[0].isdecimal():
        id_of = _devkit_ids(file)
        if unknown := sorted({label for label in labels if label not in id_of}):
            raise DataError(f"{file} has labels that are none of ILSVRC2012's: {listed(unknown)}.")
        labels = [id_of[label] for label in labels]
    return [(f"ILSVRC2012_val_{number:08d}", label) for number, label in enumerate(labels, 1)]


def _devkit_ids(file: Path) -> dict[str, str]:
    """WordNet ids by the numbers that ILSVRC2012's devkit gives the classes, which are not in their usual order."""
    meta = file.with_name("meta.mat")
    if not meta.is_file():
        raise DataError(
            f"{file} has numbers alone, which are those of ILSVRC2012's devkit: {meta.name} tells which classes they "
            "are. Leave it beside that file, as it is in the devkit's data/; or give a CSV of file and label."
        )
    try:
        from scipy.io import loadmat
    except ImportError:
        raise DataError(f"{meta} is read with scipy: pip install scipy. Or give a CSV of file and label.") from None
    try:
        synsets = loadmat(meta, squeeze_me=True)["synsets"]
        return {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in synsets}
    except Exception as error:  # scipy raises a dozen kinds
        raise DataError(f"{meta} is no meta.mat of ILSVRC2012's devkit: {error!r}.") from error
