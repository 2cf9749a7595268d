"""Hostile names: what is written of them is text, wherever it is read."""

import contextlib
import csv
import dataclasses
import html.parser
import io
import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import markdown_it
import timm
import yaml  # type: ignore[import-untyped]
from conftest import lively
from PIL import Image

from campaign.damaged import finished_report
from campaign.trial import Attempt, Finding, Outcome, Trial, outcome_of
from fixefficientnet import hub, manifest, models
from fixefficientnet._internal import environment, files
from fixefficientnet._internal.console import Console
from fixefficientnet.cli.app import print_labelled, print_table
from fixefficientnet.data.dataset import ImageDataset, open_dataset
from fixefficientnet.errors import DownloadError, FixEfficientNetError, redacted
from fixefficientnet.evaluation import figures, journal, page, tables
from fixefficientnet.evaluation.outcome import Evaluation
from fixefficientnet.evaluation.predictions import ImagePrediction, Predictions
from fixefficientnet.publishing import card
from fixefficientnet.publishing.index import Index, PublishedModel
from fixefficientnet.reproduce import report
from fixefficientnet.reproduce.folder import OURS
from fixefficientnet.reproduce.log import Log

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg/onload=alert(1)>',
    "' onmouseover='alert(1)",
    "</title><script>x</script>",
    "</style><script>x</script>",
    "--><script>x</script><!--",
    "[x](javascript:alert(1))",
    "![x](http://127.0.0.1:9/x.png)",
    "http://127.0.0.1:9/x",
    "<http://127.0.0.1:9/x>",
    "a | b | c",
    "a\n\n# heading\n\n- item",
    "a\n---\nlicense: other\n---\n",
    "```\n<script>x</script>\n```",
    "`a` **b** _c_ ~~d~~",
    "a\n| --- |",
    "&lt;script&gt; &amp; &#60;",
    "{{ 7 * 7 }} {% raw %}",
    "!!python/object/apply:os.system ['id']",
    "- a: &x [*x]",
    "null",
    "a: b # c",
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x1b]8;;http://127.0.0.1:9\x1b\\link\x1b]8;;\x1b\\",
    "\x9b31m",
    "\u202egnp.exe",
    "\u2066\u2069\u200f\u061c",
    "\u2028\u2029",
    "a\rb",
    "a\tb",
    "a\bb\x7f",
    "a\x00b",
    "[red]a[/]",
    "[link=http://127.0.0.1:9]a[/link]",
    "=1+1",
    "+1",
    "-1",
    "@SUM(1)",
    '=HYPERLINK("http://x","y")',
    '"quoted", and, commas',
    "\r=1+1",
    "$\\frac{1}{$ \\input{/etc/passwd}",
    "$x^$",
    "%n%s{0}",
    "\ud800",
    "\udcff",
    "\u00e9\u4e2d\U0001f600",
    " ",
    "x" * 300,
]
_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""What no terminal and no page may be given of a name."""


def hostile(rng: random.Random) -> str:
    """One hostile text, or some of them together."""
    return rng.choice(["", "", " ", "a"]).join(rng.choice(HOSTILE) for _ in range(rng.choice([1, 1, 1, 2, 3])))


class _Elements(html.parser.HTMLParser):
    """The elements and attributes of a page, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, str]] = set()
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found |= {(tag, name) for name, _ in attrs} | {(tag, "")}
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "action")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _elements(text: str) -> _Elements:
    found = _Elements()
    found.feed(text)
    return found


def _dataset(names: tuple[str, ...], folder: Path, title: str) -> ImageDataset:
    source = [(Image.new("RGB", (8, 8), (40 * label, 9, 9)), label) for label in range(len(names))]
    return ImageDataset(source, names, {}, title)


def _evaluation(count: int) -> Evaluation:
    rows = [ImagePrediction((index,), ((index + index % 2) % count,), 0.75, 0.5) for index in range(count)]
    return Evaluation(48, 1.0, Predictions(rows), {}, ())


@contextlib.contextmanager
def _pages(shared: Path) -> Iterator[Attempt]:
    """The page of an evaluation: of hostile names it has the same elements as of plain ones."""

    def made(name: str, place: Path) -> _Elements:
        found, dataset = _evaluation(4), _dataset((name, "b", "c", f"{name}!"), place, name)
        row = page.Row(name, found, dataset, name)
        told = page.Page(
            name, [name], [row], [row], findings=[name], warning=name, lists={name: [name]}, choices={name: name}
        )
        text = page.render(told).decode()
        assert not _FORBIDDEN.search(text)
        return _elements(text)

    usual = made("plain", shared)

    def attempt(rng: random.Random, folder: Path) -> Finding:
        name = hostile(rng)
        return outcome_of(
            lambda: made(name, folder),
            lambda one: one.found == usual.found and one.links[:2] == usual.links[:2],  # type: ignore[attr-defined]
        )

    yield attempt


def _rendered(text: str) -> _Elements:
    return _elements(markdown_it.MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(text))


def _index(name: str) -> Index:
    told, variant = finished_report(), manifest.find("b4_ns")
    model = PublishedModel(
        "b4_ns-01234567.safetensors",
        "d" * 64,
        1234,
        name,
        name,
        name,
        variant.parameters,
        variant.test,
        name,
        told.measured,
        told.paired,
        variant.paper,
        False,
        100,
        1,
        dataclasses.replace(told.recipe, variant=name),
        {name: name},
        "v1.0",
    )
    return Index("v1.0", {"b4_ns": model})


@contextlib.contextmanager
def _cards(shared: Path) -> Iterator[Attempt]:
    """Cards: the YAML of hostile names has the same keys as of plain ones, and the Markdown the same elements."""
    network = lively(timm.create_model("test_efficientnet", num_classes=2))
    loaded = dataclasses.replace(models.from_module(network), name="mine", upright=True)

    def texts(name: str) -> list[str]:
        told = dataclasses.replace(finished_report(), validation_data=f"/data/{name}", paper=None)
        own = dataclasses.replace(loaded, name=name, classes=(name, "b"))
        title = re.sub(r"[/\0]", "", name)[:90] or "x"
        return [
            card.render(f"ORGANISATION/{title}", _index(name)).decode(),
            card.render_model(f"ORGANISATION/{title}", own, name, told).decode(),
        ]

    def parts(name: str) -> list[tuple[Any, _Elements]]:
        found = []
        for text in texts(name):
            assert not _FORBIDDEN.search(text), repr(_FORBIDDEN.search(text))
            _, front, body = re.split(r"^---$", text, maxsplit=2, flags=re.M)
            found.append((yaml.safe_load(front), _rendered(body)))
        return found

    usual = parts("plain")

    def same(found: Any) -> bool:
        for (front, body), (front_usual, body_usual) in zip(found, usual, strict=True):
            assert front.keys() == front_usual.keys()
            assert body.found <= body_usual.found, body.found - body_usual.found
            assert {*body.links} == {*body_usual.links}, {*body.links} - {*body_usual.links}
        return True

    def attempt(rng: random.Random, folder: Path) -> Finding:
        name = hostile(rng)
        if not name.strip():
            name = "x"
        return outcome_of(lambda: parts(name), same)

    yield attempt


@contextlib.contextmanager
def _reports(shared: Path) -> Iterator[Attempt]:
    """report.md, and the tables in Markdown."""

    def made(name: str) -> _Elements:
        told = dataclasses.replace(
            finished_report(), variant=name, unreadable=(name,), unturned=(name,), left_out=(name,)
        )
        rows = tables.markdown_lines([{"image": name, "prediction": name, "p": 0.5}])
        text = files_text("".join([report.as_markdown(told), "\n", *rows]))
        assert not _FORBIDDEN.search(text)
        return _rendered(text)

    usual = made("plain")

    def attempt(rng: random.Random, folder: Path) -> Finding:
        name = hostile(rng)
        return outcome_of(lambda: made(name), lambda one: _alike(one, usual))

    yield attempt


def _alike(one: Any, usual: _Elements) -> bool:
    assert one.found == usual.found, one.found ^ usual.found
    assert one.links == usual.links, one.links
    return True


def files_text(text: str) -> str:
    """Text as a file has it."""
    return text.encode("utf-8", "backslashreplace").decode()


@contextlib.contextmanager
def _csv(shared: Path) -> Iterator[Attempt]:
    """CSV is for programs: whatever a name is, each reads back exactly what was written."""

    def attempt(rng: random.Random, folder: Path) -> Finding:
        rows = [{"image": hostile(rng), "prediction": hostile(rng), "confidence": "0.5"} for _ in range(3)]
        rows = [{key: files_text(value) for key, value in row.items()} for row in rows]
        files.write_text(folder / "out.csv", tables.as_csv(rows))

        def read() -> object:
            with (folder / "out.csv").open(newline="", encoding="utf-8") as stream:
                return [*csv.DictReader(stream)]

        finding = outcome_of(read, lambda found: found == rows)
        if finding.outcome is not Outcome.SURVIVED or any("\0" in str(row) for row in rows):
            return finding
        lines = [json.loads(line) for line in tables.json_lines(rows)]
        return Finding(Outcome.SURVIVED if lines == rows else Outcome.SILENT, "as JSON lines")

    yield attempt


@contextlib.contextmanager
def _terminal(shared: Path) -> Iterator[Attempt]:
    """What is printed of a name moves no cursor, sets no title, colours nothing and turns no text around."""

    def attempt(rng: random.Random, folder: Path) -> Finding:
        name, stream = hostile(rng), io.StringIO()
        console = Console(file=stream, force_terminal=True, color_system=None, highlight=False, width=100)
        log = Log(folder, enabled=True, console=console)

        def say() -> str:
            log.say(name)
            print_table(["model", "top-1"], [[name, "1.0"], [name + "b", "2.0"]], title=None, to=console)
            print_labelled({"label": name}, to=console)
            console.say(name)
            return stream.getvalue()

        return outcome_of(say, lambda said: not _FORBIDDEN.search(str(said)))

    yield attempt


@contextlib.contextmanager
def _figures(shared: Path) -> Iterator[Attempt]:
    """Names in figures are no formulas."""
    import warnings

    def attempt(rng: random.Random, folder: Path) -> Finding:
        warnings.simplefilter("ignore")
        name = hostile(rng)[:80]

        def draw() -> bool:
            figure, (axis, _) = figures.panels(2, width=4, height=3)
            axis.plot([1, 10, 100], [1, 2, 3], label=f"a {name}")
            axis.set_xscale("log")
            axis.set_title(name)
            axis.legend()
            figure.suptitle(name)
            figures.save(figure, folder / "f.svg", [1])
            text = (folder / "f.svg").read_text(encoding="utf-8")
            return not _elements(text).found & {("script", ""), ("a", ""), ("image", "")}

        return outcome_of(draw)

    yield attempt


@contextlib.contextmanager
def _folders(shared: Path) -> Iterator[Attempt]:
    """Folders and files with hostile names are data as any other."""

    def attempt(rng: random.Random, folder: Path) -> Finding:
        names = {re.sub(r"[/\0]", "", hostile(rng)).strip(" .").encode("utf-8", "surrogatepass")[:80] for _ in range(2)}
        names = {name for name in names if name} | {b"plain"}
        for name in names:
            place = folder / "data" / os.fsdecode(name)
            place.mkdir(parents=True)
            Image.new("RGB", (9, 9)).save(place / f"{os.fsdecode(name[:60])}.png")

        def load() -> bool:
            dataset = open_dataset(str(folder / "data"), None)
            pixels = [dataset[index][0].size for index in range(len(dataset))]
            made = journal.Journal(folder / "j")
            made.write(journal.FinishedBatch({}, {0: dataset.image_name(0)}, set(), 0.5))
            kept = made.read().unreadable[0] == dataset.image_name(0)
            return kept and len(pixels) == len(names) and {*map(os.fsencode, dataset.classes)} == names

        return outcome_of(load)

    yield attempt


@contextlib.contextmanager
def _exports(shared: Path) -> Iterator[Attempt]:
    """The metadata of a whole model: labels in timm's config.json and beside an exported file are one each."""
    from fixefficientnet._internal.text import inert

    network = lively(timm.create_model("test_efficientnet", num_classes=3))
    base = dataclasses.replace(models.from_module(network), upright=True)

    def attempt(rng: random.Random, folder: Path) -> Finding:
        names = tuple(f"{number} {hostile(rng)}" for number in range(3))
        told = dataclasses.replace(base, classes=names)

        def write() -> bool:
            described = models.Description.of(told)
            assert described is not None
            again = models.records.read(models.Description, json.loads(described.dumps()), "", FixEfficientNetError)
            labels = "\n".join(map(inert, names)) + "\n"
            return again.classes == names and len(labels.encode().decode().splitlines()) == 3

        return outcome_of(write)

    yield attempt


def _in_log(inside: Path, target: Path) -> None:
    (inside / "log.jsonl").symlink_to(target)
    with contextlib.suppress(OSError):
        Log(inside, enabled=True).write(1, loss=0.5)


def _to_nothing(inside: Path, target: Path) -> None:
    _in_log(inside, target.with_name("new"))


def _in_journal(inside: Path, target: Path) -> None:
    (inside / "base.0.jsonl").symlink_to(target)
    with contextlib.suppress(FixEfficientNetError):
        journal.Journal(inside / "base").write(journal.FinishedBatch())


def _in_the_place_of_a_file(inside: Path, target: Path) -> None:
    (inside / "report.json").symlink_to(target)
    files.write_text(inside / "report.json", "new")
    assert not (inside / "report.json").is_symlink()


def _in_the_place_of_a_folder(inside: Path, target: Path) -> None:
    (inside / "evaluations").symlink_to(target.parent)
    with contextlib.suppress(FixEfficientNetError):
        files.check_links(inside, OURS)
        raise AssertionError("not refused")


def _in_a_folder_of_a_run(inside: Path, target: Path) -> None:
    (inside / "checkpoint").mkdir()
    (inside / "checkpoint" / "state.safetensors").symlink_to(target)
    with contextlib.suppress(FixEfficientNetError):
        files.check_links(inside, OURS)
        raise AssertionError("not refused")


def _beside_a_manifest(inside: Path, target: Path) -> None:
    (inside / "d.safetensors").symlink_to(target)
    weights = {"path": "d.safetensors", "sha256": "d" * 64}
    with contextlib.suppress(FixEfficientNetError):
        manifest.parse_overlay(
            {"schema_version": 1, "variants": {"b0": {"weights": weights}}}, folder=inside, source="m"
        )
        raise AssertionError("not refused")


def _in_a_cache(inside: Path, target: Path) -> None:
    snapshot = inside / "models--a--b" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "f.safetensors").symlink_to(target)
    (inside / "models--a--b" / "refs").mkdir()
    (inside / "models--a--b" / "refs" / "main").write_text("0" * 40)
    with mock.patch.object(hub.constants, "HF_HUB_OFFLINE", True), contextlib.suppress(FixEfficientNetError):
        hub.fetch(hub.HubFile("a/b", "f.safetensors", "main", "d" * 64), inside)
        raise AssertionError("not refused")


_LINKS = (
    _in_log,
    _to_nothing,
    _in_journal,
    _in_the_place_of_a_file,
    _in_the_place_of_a_folder,
    _in_a_folder_of_a_run,
    _beside_a_manifest,
    _in_a_cache,
)


@contextlib.contextmanager
def _links(shared: Path) -> Iterator[Attempt]:
    """Links in folders that are written to, or deleted from, lead nowhere outside."""

    def attempt(rng: random.Random, folder: Path) -> Finding:
        outside, inside = folder / "outside", folder / "run"
        outside.mkdir()
        inside.mkdir()
        victim = outside / "victim"
        victim.write_bytes(b"precious\n")
        act = rng.choice(_LINKS)
        finding = outcome_of(lambda: act(inside, victim), lambda found: True)
        untouched = victim.read_bytes() == b"precious\n" and [*outside.iterdir()] == [victim]
        return finding if untouched else Finding(Outcome.LOST, f"{act.__name__}: what is outside was changed")

    yield attempt


@contextlib.contextmanager
def _secrets(shared: Path) -> Iterator[Attempt]:
    """No token and no password is in an error, in `env`, or in what is sent along."""

    def attempt(rng: random.Random, folder: Path) -> Finding:
        secret = "".join(rng.choice("abcdefghijkmnpqrstuvwxyzABCDEFGHJK23456789") for _ in range(30))
        token, address = f"hf_{secret}", f"http://user:{secret}@127.0.0.1:9"
        settings = {
            "HF_TOKEN": token,
            "HF_ENDPOINT": rng.choice([address, f"http://127.0.0.1:9/?token={secret}"]),
            "HTTPS_PROXY": address,
            "HTTP_PROXY": address,
            "HUGGING_FACE_HUB_TOKEN": token,
            "HF_HUB_ENDPOINT": address,
            "FIXEFFICIENTNET_MANIFEST": rng.choice([f"https://user:{secret}@host/m.json?key={secret}", f"/x/{token}"]),
            "CUDA_VISIBLE_DEVICES": rng.choice(["", token]),
        }
        kind = rng.choice(["env", "download", "manifest", "text", "offline"])

        def act() -> str:
            with mock.patch.dict(os.environ, settings):
                if kind == "env":
                    with mock.patch.object(environment, "_ask_torch", return_value={"error": f"see {address}"}):
                        return json.dumps(dataclasses.asdict(environment.look()))
                if kind == "text":
                    said = f"{address}/x: {token} {secret} Authorization: Bearer {token}"
                    return redacted(said).replace(f" {secret} ", " ")  # of a bare password, nobody can know
                try:
                    if kind == "manifest":
                        manifest.load()
                    with (
                        mock.patch.object(hub.constants, "ENDPOINT", settings["HF_ENDPOINT"]),
                        mock.patch.object(hub.constants, "HF_HUB_OFFLINE", kind == "offline"),
                        mock.patch.object(hub, "hf_hub_download", side_effect=OSError(f"GET {address}/x {token}")),
                    ):
                        hub.read(hub.HubFile("a/b", "c", "main"), folder)
                except (DownloadError, FixEfficientNetError) as error:
                    return f"{error}"
            return ""

        return outcome_of(act, lambda said: bool(said) and secret not in str(said))

    yield attempt


TRIALS = [
    Trial("hostile names in pages", 300, 5, _pages),
    Trial("hostile names in cards", 300, 20, _cards),
    Trial("hostile names in reports", 300, 20, _reports),
    Trial("hostile names in CSV and JSON lines", 500, 40, _csv),
    Trial("hostile names on a terminal", 300, 20, _terminal),
    Trial("hostile names in figures", 100, 3, _figures),
    Trial("hostile names of folders and files", 200, 20, _folders),
    Trial("hostile names in a model's metadata", 200, 10, _exports),
    Trial("links that lead out of a folder", 200, 24, _links),
    Trial("secrets of the environment", 200, 6, _secrets),
]
