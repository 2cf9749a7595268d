"""Writes what `python -m benchmarks` measured into the docs.

    python -m benchmarks.tables docs/results/speed.json docs/speed.md

Each table takes the place of what stands between its mark, `<!-- NAME -->`, and `<!-- end -->`.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.classify import LOADING, OUR_BATCH
from benchmarks.finetune import OURS, PLAIN
from fixefficientnet._internal.files import write_atomically

Rows = Sequence[Mapping[str, Any]]
FLOAT32 = tuple(f"{OURS}, {engine}" for engine in ("compile", "onnx", "openvino"))
"""Ways of `classify` that give up nothing and are not the default."""
TIMM_FLOAT32 = ("timm", "timm, channels last", *LOADING)
END = "<!-- end -->"


def markdown(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(header), *([str(cell) for cell in row] for row in rows)]
    lines.insert(1, ["---"] + ["---:"] * (len(lines[0]) - 1))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def one(rows: Rows, **fields: object) -> Mapping[str, Any]:
    """The row with these values."""
    (found,) = (row for row in rows if fields.items() <= row.items())
    return found


def in_order(values: Iterable[Any]) -> list[Any]:
    """Each value once, as they come."""
    return list(dict.fromkeys(values))


def usual(batch_sizes: Iterable[int]) -> int:
    """Our default on a CPU, if it is among them; else the smallest."""
    sizes = set(batch_sizes)
    return OUR_BATCH if OUR_BATCH in sizes else min(sizes)


def machine(found: Mapping[str, Any]) -> str:
    facts = found["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    device = f"{facts['gpu']}; " if facts.get("gpu") else ""
    taken: dict[str, dict[str, set[int]]] = {}
    for row in found["rows"]:
        then = taken.setdefault(f"{row['date']} from commit {row['commit']}", {})
        then.setdefault(row["benchmark"], set()).add(row["rounds"])
    when = "; ".join(
        f"{when}: {', '.join(f'{name} ({_listed(rounds)})' for name, rounds in names.items())}"
        for when, names in taken.items()
    )
    said = f"Machine: {device}{facts['threads']} cores ({facts['cpu']}); Python {facts['python']}, {versions}.\n"
    said += f"Taken on {when}."
    noted = [row for row in found["rows"] if row["rounds"] > 1 and "spread" in row]
    if spreads := sorted(row["spread"] for row in noted):
        usual, most = spreads[len(spreads) // 2], spreads[-1]
        said += f"\nOf {' and '.join(in_order(row['benchmark'] for row in noted))}, the slowest round took {usual:.0%}"
        said += f" longer than its fastest (the median of {len(spreads)}; at most {most:.0%})."
    return said


def _listed(rounds: set[int]) -> str:
    return f"{' or '.join(map(str, sorted(rounds)))} round{'s' if rounds != {1} else ''}"


def classify(rows: Rows) -> str:
    tables = []
    for variant, size in in_order((row["variant"], row["size"]) for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        batches = in_order(row["batch_size"] for row in mine)
        header = [f"{variant} at {size}: images/s (times timm)", *(f"batches of {batch}" for batch in batches)]
        header += ["predictions as timm's, the fewest"]
        lines = []
        for setup in in_order(row["setup"] for row in mine):
            of_setup = {row["batch_size"]: row for row in mine if row["setup"] == setup}
            line = [setup]
            for batch in batches:
                row = of_setup.get(batch)
                line.append(f"{row['images_per_second']:.1f} ({row['times_timm']:.2f})" if row else "-")
            same = [row["same_predictions"] for row in of_setup.values() if row["same_predictions"] is not None]
            lines.append([*line, f"{min(same)} of {mine[0]['images']}" if same else "-"])
        tables.append(markdown(header, lines))
    return "\n\n".join(filter(None, (*tables, _exporting(rows))))


def _exporting(rows: Rows) -> str:
    """What an exported file costs, and after how many images it has paid."""
    networks = in_order((row["variant"], row["size"]) for row in rows)
    lines = []
    for setup in in_order(row["setup"] for row in rows if row["setup"] in FLOAT32 and row.get("exporting_seconds")):
        seconds, images = [], []
        for variant, _ in networks:
            mine = [row for row in rows if row["variant"] == variant]
            exporting = max(row["exporting_seconds"] for row in mine if row["setup"] == setup)
            batch = usual(row["batch_size"] for row in mine)
            rates = [one(mine, setup=each, batch_size=batch)["images_per_second"] for each in (OURS, setup)]
            seconds.append(f"{exporting:.1f} s")
            images.append(f"{exporting / (1 / rates[0] - 1 / rates[1]):.0f}" if rates[1] > rates[0] else "never")
        lines += [[f"{setup}: exporting", *seconds], [f"{setup}: images until it has paid", *images]]
    return (
        markdown(["once per model and size", *(f"{variant} at {size}" for variant, size in networks)], lines)
        if lines
        else ""
    )


def preprocess(rows: Rows) -> str:
    cases = in_order(row["case"] for row in rows)
    header = ["images/s (times timm)", *cases, "largest difference, of 255"]
    lines = []
    for setup in in_order(row["setup"] for row in rows):
        mine = [one(rows, setup=setup, case=case) for case in cases]
        rates = [f"{row['images_per_second']:.0f} ({row['times_timm']:.2f})" for row in mine]
        lines.append([setup, *rates, f"{max(row['largest_difference'] for row in mine):.0f}"])
    return markdown(header, lines)


def accuracy(rows: Rows) -> str:
    variants = in_order(row["variant"] for row in rows)

    def cell(row: Mapping[str, Any]) -> str:
        return f"{row['correct']} (+{row['won']} -{row['lost']})"

    header = [f"correct, of {rows[0]['images']} images (against eager)", *variants]
    setups = in_order(row["setup"] for row in rows)
    return markdown(
        header, ([setup, *(cell(one(rows, setup=setup, variant=key)) for key in variants)] for setup in setups)
    )


def forward(rows: Rows) -> str:
    cases = in_order((row["variant"], row["size"], row["threads"]) for row in rows)
    header = ["images/s (times plain, one batch at a time)"]
    header += [f"{key} at {size}, {'one at a time' if n == 1 else 'several at once'}" for key, size, n in cases]
    header += ["largest difference, relative"]
    lines = []
    for setup in in_order(row["setup"] for row in rows):
        line = [setup]
        for key, _, count in cases:
            mine = [row for row in rows if (row["setup"], row["variant"], row["threads"]) == (setup, key, count)]
            plain = one(rows, setup="plain", variant=key, threads=1)["images_per_second"]
            rate = mine[0]["images_per_second"] if mine else 0
            line.append(f"{rate:.1f} ({rate / plain:.2f})" if mine else "-")
        lines.append([*line, f"{max(row['largest_difference'] for row in rows if row['setup'] == setup):.0e}"])
    return markdown(header, lines)


def load(rows: Rows) -> str:
    header = ["", "warm, s: timm", "ours", "times", "cold, s: timm", "ours", "times", "MiB: timm", "ours"]
    header += ["to download, MB", "with the backbone there"]
    lines = []
    for key in in_order(row["variant"] for row in rows):
        timm, ours = (one(rows, variant=key, setup=setup) for setup in ("timm", OURS))
        line = [key]
        for name in ("warm", "cold"):
            line += [f"{timm[name]:.2f}", f"{ours[name]:.2f}", f"{timm[name] / ours[name]:.1f}"]
        line += [f"{timm['cold_megabytes']:.0f}", f"{ours['cold_megabytes']:.0f}"]
        both = ours["backbone_bytes"] + ours["delta_bytes"]
        lines.append([*line, f"{both / 1e6:.1f}", f"{ours['delta_bytes'] / 1e6:.1f}"])
    return markdown(header, lines)


def start(rows: Rows) -> str:
    header = ["", "seconds", "beyond the bare interpreter"]
    return markdown(header, ([row["setup"], f"{row['seconds']:.2f}", f"{row['beyond_bare']:.2f}"] for row in rows))


def finetune(rows: Rows) -> str:
    parts = {part: [row for row in rows if row["part"] == part] for part in ("step", "methods", "growth")}
    steps = markdown(
        ["step of Lite0", "size", "batch", "images/s", "growth of peak memory, MiB"],
        (
            [row["setup"], row["size"], row["batch_size"], f"{row['images_per_second']:.1f}", f"{row['megabytes']:.0f}"]
            for row in parts["step"]
        ),
    )
    untuned = parts["methods"][0]

    def accuracy(row: Mapping[str, Any], which: str) -> str:
        return f"{row[f'{which}_top1']:.2f} ({row[f'{which}_top1_low']:.1f} to {row[f'{which}_top1_high']:.1f})"

    methods = markdown(
        [
            f"method, at {untuned['size']}",
            "forward passes per image",
            "seconds, evaluations included",
            "top-1 (95% interval)",
        ],
        [
            ["untuned", "0", "-", accuracy(untuned, "base_at_test")],
            *(
                [row["setup"], f"{row['forwards_per_image']:.2f}", f"{row['seconds']:.0f}", accuracy(row, "tuned")]
                for row in parts["methods"]
            ),
        ],
    )
    growth = markdown(
        ["whole command, at 160", "images", "processes", "seconds", "largest process, MiB"],
        (
            [row["setup"], row["images"], row["processes"], f"{row['seconds']:.0f}", f"{row['megabytes']:.0f}"]
            for row in parts["growth"]
        ),
    )
    return f"{steps}\n\n{methods}\n\n{growth}"


def cost(rows: Rows) -> str:
    header = ["", "size", "GMACs", "MiB", "images/s", "times the base's time", "paper's top-1"]
    header += ["base models' in the same time"]
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
    """Top-1 of the family's base models in the time that FixRes takes: on the line between the two neighbours."""
    family = [one for one in rows if one["family"] == row["family"] and one["base_top1"]]
    bases = sorted((one["base_seconds"], one["base_top1"]) for one in family)
    for (fewer, low), (more, high) in pairwise(bases):
        if fewer <= row["fix_seconds"] <= more:
            share = math.log(row["fix_seconds"] / fewer) / math.log(more / fewer)
            return f"{low + share * (high - low):.1f}"
    return "-"


def summary(found: Mapping[str, Any]) -> str:
    """The other tables' headlines."""
    rows = found["rows"]
    of = {name: [row for row in rows if row["benchmark"] == name] for name in TABLES}
    lines: list[list[str]] = []

    def add(what: str, ours: float, theirs: float, unit: str, digits: int, peer: str = "timm") -> None:
        times = ours / theirs if unit == "images/s" else theirs / ours
        lines.append([what, f"{ours:.{digits}f} {unit}", f"{theirs:.{digits}f} {unit} ({peer})", f"{times:.2f}"])

    cases = in_order((row["variant"], row["size"], row["batch_size"]) for row in of["classify"])
    batches = {usual(case[2] for case in cases)} if cases else set()
    for variant, size, batch in (case for case in cases if case[2] in batches):
        mine = [row for row in of["classify"] if (row["variant"], row["batch_size"]) == (variant, batch)]
        timm = one(mine, setup="timm")["images_per_second"]
        default = one(mine, setup=OURS)["images_per_second"]
        what = f"folder to labels, {variant} at {size}, batches of {batch}"
        add(f"{what}, default engine", default, timm, "images/s", 1)
        best = max((row for row in mine if row["setup"] in TIMM_FLOAT32), key=lambda row: float(row["times_timm"]))
        if best["setup"] != "timm":
            add(
                "the same, against timm's fastest setup",
                default,
                best["images_per_second"],
                "images/s",
                1,
                best["setup"],
            )
        if engines := [row for row in mine if row["setup"] in FLOAT32]:
            best = max(engines, key=lambda row: float(row["times_timm"]))
            engine = best["setup"].rpartition(", ")[2]
            add(f"{what}, --engine {engine}", best["images_per_second"], timm, "images/s", 1)
    tensors = "torchvision v2, on tensors"
    for setup, name, peer in ((OURS, "the same pixels", "timm"), (f"{OURS}, fast", "--fast-preprocessing", tensors)):
        if mine := [row for row in of["preprocess"] if row["case"] == "320"]:
            ours, theirs = (one(mine, setup=each)["images_per_second"] for each in (setup, peer))
            add(f"JPEG to tensor at 320, {name}, one core", ours, theirs, "images/s", 0, peer)
    for key in ("b0", "b8", "l2"):
        if mine := [row for row in of["load"] if row["variant"] == key]:
            timm, ours = (one(mine, setup=setup) for setup in ("timm", OURS))
            add(f"create {key} and first image, warm", ours["warm"], timm["warm"], "s", 2)
            add("the same, memory", ours["cold_megabytes"], timm["cold_megabytes"], "MiB", 0)
    if of["start"]:
        seconds = {row["setup"]: row["seconds"] for row in of["start"]}
        first = seconds["fixefficientnet predict cat.jpg"], seconds["the same prediction with timm"]
        add("first prediction, from the command line", *first, "s", 2)
        for setup in (setup for setup in seconds if "evaluat" in setup and "timm" not in setup):
            what = setup.replace(f"{OURS} evaluate", "a whole evaluation, from the command line")
            add(what, seconds[setup], seconds["the same evaluation with timm"], "s", 1)
    steps = [row for row in of["finetune"] if row["part"] == "step" and (row["size"], row["batch_size"]) == (160, 64)]
    if steps:
        ours, plain = (one(steps, setup=setup)["images_per_second"] for setup in (OURS, PLAIN))
        add("FixRes step, Lite0 at 160", ours, plain, "images/s", 1, "plain PyTorch loop")
    return markdown(["", "fixefficientnet", "peer", "times as good"], lines)


TABLES: dict[str, Callable[[Rows], str]] = {
    "classify": classify,
    "preprocess": preprocess,
    "accuracy": accuracy,
    "forward": forward,
    "load": load,
    "start": start,
    "finetune": finetune,
    "cost": cost,
}


def rendered(found: Mapping[str, Any], text: str) -> str:
    """A page with the tables of these figures.

    Raises:
        ValueError: It has no mark for one of them; or there are no figures for a table of its.
    """
    tables = every_table(found)
    for name in ("machine", "summary", *TABLES):
        before, mark, after = text.partition(f"<!-- {name} -->\n")
        _, end, rest = after.partition(END)
        if not mark or not end:
            raise ValueError(f"the page has no <!-- {name} --> with an {END} for its table.")
        if name not in tables:
            raise ValueError(f"there are no figures of {name} for the page. Without a page, what there is is printed.")
        text = f"{before}{mark}{tables[name]}\n{END}{rest}"
    return text


def every_table(found: Mapping[str, Any]) -> dict[str, str]:
    """What there is to be shown, by name."""
    parts = {name: [row for row in found["rows"] if row["benchmark"] == name] for name in TABLES}
    tables = {name: TABLES[name](rows) for name, rows in parts.items() if rows}
    return {"machine": machine(found), "summary": summary(found), **tables}


def shown(found: Mapping[str, Any]) -> str:
    """All tables that there are, one after the other."""
    return "\n\n".join(f"## {name}\n\n{table}" for name, table in every_table(found).items())


def read(path: Path) -> dict[str, Any]:
    """The figures in a file; where there are none, one line says so and the program ends."""
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
