"""Writes the measurements of `python -m benchmarks` into the docs, as tables.

    python -m benchmarks.tables docs/results/speed.json docs/speed.md

Each table replaces what the page has between `<!-- NAME -->` and `<!-- end -->`.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.classify import LOADING, OUR_BATCH
from benchmarks.finetune import OURS, PLAIN
from fixefficientnet._internal.files import write_atomically

Rows = Sequence[Mapping[str, Any]]
FLOAT32 = tuple(f"{OURS}, {engine}" for engine in ("compile", "onnx", "openvino"))
"""Methods of `classify` in float32 that are not the default."""
TIMM_FLOAT32 = ("timm", "timm, channels last", *LOADING)
STEP = ("step", 160, 64)
"""Part, size and batch size of the fine-tuning step in the summary."""
END = "<!-- end -->"


def markdown(header: Iterable[str], rows: Iterable[Iterable[object]], align: str = "---:") -> str:
    """Returns a Markdown table; `align` is the delimiter of the columns after the first."""
    lines = [list(header), *([str(cell) for cell in row] for row in rows)]
    lines.insert(1, ["---"] + [align] * (len(lines[0]) - 1))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def one(rows: Rows, **fields: object) -> Mapping[str, Any]:
    """Returns the only row with these values."""
    (found,) = (row for row in rows if fields.items() <= row.items())
    return found


def in_order(values: Iterable[Any]) -> list[Any]:
    """Returns each value once, in order of first appearance."""
    return list(dict.fromkeys(values))


def usual(batch_sizes: Iterable[int]) -> int:
    """Returns the default batch size on a CPU if it is among these, or the smallest."""
    sizes = set(batch_sizes)
    return OUR_BATCH if OUR_BATCH in sizes else min(sizes)


def machine(found: Mapping[str, Any]) -> str:
    """Returns the tables of the machine and of the rounds, and the spread of the rounds."""
    facts = found["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    device = f"{facts['gpu']}; " if facts.get("gpu") else ""
    cores = f"{device}{facts['threads']} cores ({facts['cpu']})"
    parts = [markdown(["machine", cores], [["versions", f"Python {facts['python']}, {versions}"]], "---")]
    rounds: dict[tuple[str, str, str], set[int]] = {}
    for row in found["rows"]:
        rounds.setdefault((row["benchmark"], row["date"], row["commit"]), set()).add(row["rounds"])
    lines = ([*run, " or ".join(map(str, sorted(counts)))] for run, counts in rounds.items())
    parts.append(markdown(["benchmark", "date", "commit", "rounds"], lines))
    noted = [row for row in found["rows"] if row["rounds"] > 1 and "spread" in row]
    if spreads := sorted(row["spread"] for row in noted):
        median, most = spreads[len(spreads) // 2], spreads[-1]
        names = " and ".join(in_order(row["benchmark"] for row in noted))
        parts.append(
            f"Of {names}, a method's slowest round took {median:.0%} longer than its fastest\n"
            f"(the median of {len(spreads)}; at most {most:.0%})."
        )
    return "\n\n".join(parts)


def classify(rows: Rows) -> str:
    tables = []
    for variant, size in in_order((row["variant"], row["size"]) for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        batches = in_order(row["batch_size"] for row in mine)
        header = [f"{variant} at {size}: images/s (times timm)", *(f"batches of {batch}" for batch in batches)]
        header += ["predictions equal to timm's (fewest)"]
        lines = []
        for method in in_order(row["method"] for row in mine):
            of_method = {row["batch_size"]: row for row in mine if row["method"] == method}
            line = [method]
            for batch in batches:
                row = of_method.get(batch)
                line.append(f"{row['images_per_second']:.1f} ({row['times_timm']:.2f})" if row else "-")
            same = [row["same_predictions"] for row in of_method.values() if row["same_predictions"] is not None]
            lines.append([*line, f"{min(same)} of {mine[0]['images']}" if same else "-"])
        tables.append(markdown(header, lines))
    return "\n\n".join(filter(None, (*tables, _exporting(rows))))


def _exporting(rows: Rows) -> str:
    """Returns the table of export times, and of the images after which an export has saved as much."""
    networks = in_order((row["variant"], row["size"]) for row in rows)
    lines = []
    for method in in_order(row["method"] for row in rows if row["method"] in FLOAT32 and row.get("exporting_seconds")):
        seconds, images = [], []
        for variant, _ in networks:
            mine = [row for row in rows if row["variant"] == variant]
            exporting = max(row["exporting_seconds"] for row in mine if row["method"] == method)
            batch = usual(row["batch_size"] for row in mine)
            rates = [one(mine, method=each, batch_size=batch)["images_per_second"] for each in (OURS, method)]
            seconds.append(f"{exporting:.1f} s")
            images.append(f"{exporting / (1 / rates[0] - 1 / rates[1]):.0f}" if rates[1] > rates[0] else "never")
        lines += [[f"{method}: exporting", *seconds], [f"{method}: images to break even", *images]]
    return (
        markdown(["once per model and size", *(f"{variant} at {size}" for variant, size in networks)], lines)
        if lines
        else ""
    )


def preprocess(rows: Rows) -> str:
    cases = in_order(row["case"] for row in rows)
    header = ["images/s (times timm)", *cases, "largest difference, of 255"]
    lines = []
    for method in in_order(row["method"] for row in rows):
        mine = [one(rows, method=method, case=case) for case in cases]
        rates = [f"{row['images_per_second']:.0f} ({row['times_timm']:.2f})" for row in mine]
        lines.append([method, *rates, f"{max(row['largest_difference'] for row in mine):.0f}"])
    return markdown(header, lines)


def loading(rows: Rows) -> str:
    workers = in_order(row["workers"] for row in rows)
    tables = []
    for size in in_order(row["size"] for row in rows):
        mine = [row for row in rows if row["size"] == size]
        header = [f"at {size}, batches of {mine[0]['batch_size']}"]
        header += [f"images/s (times torchvision), {count} worker{'s' * (count > 1)}" for count in workers]
        header += ["CPU ms per image (share of torchvision's)", f"MiB in flight, {workers[-1]} workers", "in all"]
        lines = []
        for method in in_order(row["method"] for row in mine):
            of = [one(mine, method=method, workers=count) for count in workers]
            rates = [f"{row['images_per_second']:.0f} ({row['times_torchvision']:.2f})" for row in of]
            cpu = f"{of[0]['cpu_seconds'] * 1000:.1f} ({of[0]['times_torchvisions_cpu']:.2f})"
            lines.append([method, *rates, cpu, f"{of[-1]['in_flight']:.0f}", f"{of[-1]['memory']:.0f}"])
        tables.append(markdown(header, lines))
    return "\n\n".join(tables)


def serve(rows: Rows) -> str:
    header = ["Lite0 at 256", "images/s (times predict)", f"predictions equal, of {rows[0]['images']}"]
    return markdown(
        header,
        (
            [row["method"], f"{row['images_per_second']:.1f} ({row['times_predict']:.2f})", row["same_predictions"]]
            for row in rows
        ),
    )


def export(rows: Rows) -> str:
    tables = []
    for model in in_order(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        header = [model, "MB", "largest difference of a logit", "images/s", "s to export and check"]
        lines = [
            [
                f"{row['format']}, {row['method']}",
                f"{row['bytes'] / 1e6:.1f}",
                f"{row['difference']:.0e} of {row['largest_logit']:.2g}",
                f"{row['images_per_second']:.1f}",
                f"{row['exporting_seconds']:.0f}",
            ]
            for row in mine
        ]
        tables.append(markdown(header, lines))
    return "\n\n".join(tables)


def accuracy(rows: Rows) -> str:
    variants = in_order(row["variant"] for row in rows)

    def cell(row: Mapping[str, Any]) -> str:
        return f"{row['correct']} (+{row['won']} -{row['lost']})"

    header = [f"correct, of {rows[0]['images']} images (against eager)", *variants]
    methods = in_order(row["method"] for row in rows)
    return markdown(
        header, ([method, *(cell(one(rows, method=method, variant=key)) for key in variants)] for method in methods)
    )


def forward(rows: Rows) -> str:
    cases = in_order((row["variant"], row["size"], row["threads"]) for row in rows)
    header = ["images/s (times plain PyTorch, one batch at a time)"]
    header += [
        f"{key} at {size}, {'one batch at a time' if n == 1 else 'one batch per core'}" for key, size, n in cases
    ]
    header += ["largest relative difference"]
    lines = []
    for method in in_order(row["method"] for row in rows):
        line = [method]
        for key, _, count in cases:
            mine = [row for row in rows if (row["method"], row["variant"], row["threads"]) == (method, key, count)]
            plain = one(rows, method="plain", variant=key, threads=1)["images_per_second"]
            rate = mine[0]["images_per_second"] if mine else 0
            line.append(f"{rate:.1f} ({rate / plain:.2f})" if mine else "-")
        lines.append([*line, f"{max(row['largest_difference'] for row in rows if row['method'] == method):.0e}"])
    return markdown(header, lines)


def load(rows: Rows) -> str:
    header = ["", "warm, s: timm", "ours", "times", "cold, s: timm", "ours", "times", "MiB: timm", "ours"]
    header += ["to download, MB", "with the backbone cached"]
    lines = []
    for key in in_order(row["variant"] for row in rows):
        timm, ours = (one(rows, variant=key, method=method) for method in ("timm", OURS))
        line = [key]
        for name in ("warm", "cold"):
            line += [f"{timm[name]:.2f}", f"{ours[name]:.2f}", f"{timm[name] / ours[name]:.1f}"]
        line += [f"{timm['cold_megabytes']:.0f}", f"{ours['cold_megabytes']:.0f}"]
        both = ours["backbone_bytes"] + ours["delta_bytes"]
        lines.append([*line, f"{both / 1e6:.1f}", f"{ours['delta_bytes'] / 1e6:.1f}"])
    return markdown(header, lines)


def start(rows: Rows) -> str:
    header = ["", "seconds", "beyond the bare interpreter"]
    return markdown(header, ([row["command"], f"{row['seconds']:.2f}", f"{row['beyond_bare']:.2f}"] for row in rows))


def finetune(rows: Rows) -> str:
    parts = {part: [row for row in rows if row["part"] == part] for part in ("step", "methods", "growth")}
    steps = markdown(
        ["step of Lite0", "size", "batch", "images/s", "growth of peak memory, MiB"],
        (
            [
                row["method"],
                row["size"],
                row["batch_size"],
                f"{row['images_per_second']:.1f}",
                f"{row['megabytes']:.0f}",
            ]
            for row in parts["step"]
        ),
    )
    methods = markdown(
        [f"method, at {parts['methods'][0]['size']}", "forward passes per image", "seconds, evaluations included"],
        ([row["method"], f"{row['forwards_per_image']:.2f}", f"{row['seconds']:.0f}"] for row in parts["methods"]),
    )
    growth = markdown(
        ["whole command, at 160", "images", "processes", "seconds", "largest process, MiB"],
        (
            [row["method"], row["images"], row["processes"], f"{row['seconds']:.0f}", f"{row['megabytes']:.0f}"]
            for row in parts["growth"]
        ),
    )
    return f"{steps}\n\n{methods}\n\n{growth}"


def cost(rows: Rows) -> str:
    header = ["", "size", "GMACs", "MiB", "images/s", "times the base's time", "paper's top-1"]
    header += ["base models' top-1 in the same time"]
    lines = []
    for row in rows:
        rates = [1 / row[f"{which}_seconds"] for which in ("base", "fix")]
        paper = f"{row['base_top1']} to {row['fix_top1']}" if row["fix_top1"] else "-"
        lines.append(
            [
                row["variant"],
                f"{row['base_size']} to {row['fix_size']}",
                f"{row['base_gmacs']:.2f} to {row['fix_gmacs']:.2f}",
                f"{row['base_megabytes']:.0f} to {row['fix_megabytes']:.0f}",
                f"{rates[0]:.2f} to {rates[1]:.2f}",
                f"{rates[0] / rates[1]:.2f}",
                paper,
                _base_in_the_same_time(row, rows),
            ]
        )
    return markdown(header, lines)


def _base_in_the_same_time(row: Mapping[str, Any], rows: Rows) -> str:
    """Interpolates the top-1 of the family's base models at the time that the FixRes model takes."""
    family = [one for one in rows if one["family"] == row["family"] and one["base_top1"]]
    bases = sorted((one["base_seconds"], one["base_top1"]) for one in family)
    for (fewer, low), (more, high) in pairwise(bases):
        if fewer <= row["fix_seconds"] <= more:
            share = math.log(row["fix_seconds"] / fewer) / math.log(more / fewer)
            return f"{low + share * (high - low):.1f}"
    return "-"


@dataclass(frozen=True)
class Headline:
    """A line of the summary: a figure of this package beside another library's.

    Attributes:
        what: What was measured.
        ours: The figure of this package, in `unit`.
        theirs: The figure of the other library, in `unit`.
        unit: "images/s", of which more is better, or "s" or "MiB", of which less is better.
        digits: Decimal places to show.
        peer: The other library.
    """

    what: str
    ours: float
    theirs: float
    unit: str
    digits: int
    peer: str = "timm"

    @property
    def cells(self) -> list[str]:
        """The line's cells."""
        times = self.ours / self.theirs if self.unit == "images/s" else self.theirs / self.ours
        figures = [f"{figure:.{self.digits}f} {self.unit}" for figure in (self.ours, self.theirs)]
        return [self.what, figures[0], f"{figures[1]} ({self.peer})", f"{times:.2f}"]


def summary(found: Mapping[str, Any]) -> str:
    """Returns the table of the most important figures of all benchmarks."""
    of = {name: [row for row in found["rows"] if row["benchmark"] == name] for name in TABLES}
    lines = [
        *_classify_headlines(of["classify"]),
        *_preprocess_headlines(of["preprocess"]),
        *_load_headlines(of["load"]),
        *_start_headlines(of["start"]),
    ]
    if steps := [row for row in of["finetune"] if (row["part"], row.get("size"), row.get("batch_size")) == STEP]:
        ours, plain = (one(steps, method=method)["images_per_second"] for method in (OURS, PLAIN))
        lines.append(Headline("FixRes step, Lite0 at 160", ours, plain, "images/s", 1, "plain PyTorch loop"))
    return markdown(["", "fixefficientnet", "peer", "times as good"], (line.cells for line in lines))


def _classify_headlines(rows: Rows) -> Iterator[Headline]:
    cases = in_order((row["variant"], row["size"], row["batch_size"]) for row in rows)
    batches = {usual(case[2] for case in cases)} if cases else set()
    for variant, size, batch in (case for case in cases if case[2] in batches):
        mine = [row for row in rows if (row["variant"], row["batch_size"]) == (variant, batch)]
        rates = {row["method"]: float(row["images_per_second"]) for row in mine}
        what = f"folder to labels, {variant} at {size}, batches of {batch}"
        yield Headline(f"{what}, default engine", rates[OURS], rates["timm"], "images/s", 1)
        best = max((method for method in rates if method in TIMM_FLOAT32), key=rates.__getitem__)
        if best != "timm":
            yield Headline("the same, against timm's fastest options", rates[OURS], rates[best], "images/s", 1, best)
        if engines := [method for method in rates if method in FLOAT32]:
            best = max(engines, key=rates.__getitem__)
            engine = best.rpartition(", ")[2]
            yield Headline(f"{what}, --engine {engine}", rates[best], rates["timm"], "images/s", 1)


def _preprocess_headlines(rows: Rows) -> Iterator[Headline]:
    rates = {row["method"]: row["images_per_second"] for row in rows if row["case"] == "320"}
    tensors = "torchvision v2, on tensors"
    for method, name, peer in ((OURS, "the same pixels", "timm"), (f"{OURS}, fast", "--fast-preprocessing", tensors)):
        if rates:
            what = f"JPEG to tensor at 320, {name}, one core"
            yield Headline(what, rates[method], rates[peer], "images/s", 0, peer)


def _load_headlines(rows: Rows) -> Iterator[Headline]:
    for key in ("b0", "b8", "l2"):
        if mine := [row for row in rows if row["variant"] == key]:
            timm, ours = (one(mine, method=method) for method in ("timm", OURS))
            yield Headline(f"create {key} and first image, warm", ours["warm"], timm["warm"], "s", 2)
            yield Headline("the same, memory", ours["cold_megabytes"], timm["cold_megabytes"], "MiB", 0)


def _start_headlines(rows: Rows) -> Iterator[Headline]:
    seconds = {row["command"]: row["seconds"] for row in rows}
    if not seconds:
        return
    first = seconds["fixefficientnet predict cat.jpg"], seconds["the same prediction with timm"]
    yield Headline("first prediction, from the command line", *first, "s", 2)
    for command in (command for command in seconds if "evaluat" in command and "timm" not in command):
        what = command.replace(f"{OURS} evaluate", "a whole evaluation, from the command line")
        yield Headline(what, seconds[command], seconds["the same evaluation with timm"], "s", 1)


TABLES: dict[str, Callable[[Rows], str]] = {
    "classify": classify,
    "preprocess": preprocess,
    "loading": loading,
    "serve": serve,
    "export": export,
    "accuracy": accuracy,
    "forward": forward,
    "load": load,
    "start": start,
    "finetune": finetune,
    "cost": cost,
}


def rendered(found: Mapping[str, Any], text: str) -> str:
    """Replaces the tables of a page by those of these figures.

    Args:
        found: The measurements, as `python -m benchmarks --json` writes them.
        text: The page.

    Returns:
        The new page.

    Raises:
        ValueError: The page has no place for a table, or there are no figures for one of its tables.
    """
    tables = every_table(found)
    for name in ("machine", "summary", *TABLES):
        before, opening, after = text.partition(f"<!-- {name} -->\n")
        _, end, rest = after.partition(END)
        if not opening and name not in tables:
            continue
        if not opening or not end:
            raise ValueError(f"the page has no <!-- {name} --> with an {END} for its table.")
        if name not in tables:
            raise ValueError(
                f"there are no figures of {name} for the page. Leave out the page to print the tables that there are."
            )
        text = f"{before}{opening}{tables[name]}\n{END}{rest}"
    return text


def every_table(found: Mapping[str, Any]) -> dict[str, str]:
    """Returns the tables for which there are figures, by name."""
    parts = {name: [row for row in found["rows"] if row["benchmark"] == name] for name in TABLES}
    tables = {name: TABLES[name](rows) for name, rows in parts.items() if rows}
    return {"machine": machine(found), "summary": summary(found), **tables}


def shown(found: Mapping[str, Any]) -> str:
    """Returns all tables for which there are figures, as one text."""
    return "\n\n".join(f"## {name}\n\n{table}" for name, table in every_table(found).items())


def read(path: Path) -> dict[str, Any]:
    """Reads the figures of a file.

    Raises:
        SystemExit: The file has no figures; the message says so.
    """
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}.") from None
    except ValueError as error:
        raise SystemExit(f"{path} is no JSON: {error}.") from None
    if not isinstance(found, dict) or not found.get("rows") or "machine" not in found:
        raise SystemExit(f"{path}: there are no figures of `python -m benchmarks --json` in it.")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", type=Path, help="figures of `python -m benchmarks --json`")
    parser.add_argument("page", type=Path, nargs="?", help="Default: prints all tables.")
    options = parser.parse_args()
    found = read(options.json)
    if options.page is None:
        print(shown(found))
        return
    try:
        write_atomically(options.page, rendered(found, options.page.read_text()).encode())
    except OSError as error:
        raise SystemExit(f"{options.page}: {error.strerror}.") from None
    except ValueError as error:
        raise SystemExit(f"{options.page}: {error}") from None


if __name__ == "__main__":
    main()
