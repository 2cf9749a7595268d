"""The command line of the campaign."""

import argparse
import datetime
import json
import os
import sys
from typing import Any

from conftest import ROOT  # before all else: it sets an environment without network and without caches

from benchmarks import machine, tables
from campaign import trial
from campaign.parts import PARTS
from campaign.trial import BAD, Outcome, Tally, Trial
from fixefficientnet._internal.files import write_text

RESULTS, PAGE = ROOT / "docs" / "results" / "reliability.json", ROOT / "docs" / "reliability.md"


def main() -> None:
    """Runs the trials that were asked for, and prints a line for each."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}, or TRIAL's name; all, if none is named")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the attempts (default: 1, all)")
    parser.add_argument("--only", type=int, help="number of one attempt, to repeat it")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name} and the table of {PAGE.name}")
    options = parser.parse_args()
    os.chdir(ROOT)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    failed = False
    for part, one in _chosen(options.parts):
        numbers = range(max(1, round(one.attempts * options.share)))
        if options.only is not None:
            numbers = range(options.only, options.only + 1)
        tally = trial.run(one, numbers, options.seed, _teller(one, len(numbers)))
        row = _row(part, one, tally, options.seed)
        print(f"\r\033[K{_line(row)}" if sys.stderr.isatty() else _line(row), flush=True)
        for number, said in tally.bad.items():
            print(f"    --only {number}: {said}", flush=True)
        failed |= bool(tally.bad)
        found = {"machine": machine.facts("cpu"), "rows": _merged(found["rows"], row)}
        if options.write:
            write_text(RESULTS, json.dumps(found, indent=1) + "\n")
            write_text(PAGE, with_table(PAGE.read_text(), found))
    sys.exit(failed)


def _chosen(names: list[str]) -> list[tuple[str, Trial]]:
    trials = [(part, one) for part, module in PARTS.items() for one in module.TRIALS]
    known = {*PARTS, *(one.name for _, one in trials)}
    if unknown := set(names) - known:
        sys.exit(f"No part or trial: {', '.join(unknown)}. There are:\n" + "\n".join(sorted(known)))
    return [(part, one) for part, one in trials if not names or part in names or one.name in names]


def _teller(one: Trial, of: int):
    def tell(done: int) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{one.name}: {done} of {of}", end="", file=sys.stderr, flush=True)

    return tell


def _row(part: str, one: Trial, tally: Tally, seed: int) -> dict[str, Any]:
    return {
        "part": part,
        "trial": one.name,
        "attempts": tally.counts.total(),
        **{outcome.value: tally.counts[outcome] for outcome in Outcome},
        "longest": round(tally.longest, 1),
        "seed": seed,
        "date": datetime.date.today().isoformat(),
        "commit": machine.commit(),
    }


def _line(row: dict[str, Any]) -> str:
    counts = ", ".join(f"{row[outcome]} {outcome}" for outcome in Outcome if row[outcome])
    return f"{row['part']}: {row['trial']}: {counts}; at most {row['longest']} s"


def _merged(rows: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with one in the place of its last figures, in the order of the trials."""
    order = [one.name for _, one in _chosen([])]
    kept = [other for other in rows if other["trial"] != row["trial"] and other["trial"] in order]
    return sorted([*kept, row], key=lambda each: order.index(each["trial"]))


def with_table(page: str, found: dict[str, Any]) -> str:
    """The page with the table of these figures between its marks."""
    before, _, rest = page.partition("<!-- table -->\n")
    return f"{before}<!-- table -->\n{table(found)}\n{rest[rest.index(tables.END) :]}"


def table(found: dict[str, Any]) -> str:
    """The table of docs/reliability.md."""
    header = ["what was tried", "attempts", *Outcome, "longest (s)"]
    rows = [[row["trial"], row["attempts"], *(row[o] for o in Outcome), row["longest"]] for row in found["rows"]]
    totals = [sum(row[o] for row in found["rows"]) for o in ("attempts", *Outcome)]
    facts = found["machine"]
    dates = sorted({row["date"] for row in found["rows"]})
    said = (
        f"{' to '.join(dict.fromkeys([dates[0], dates[-1]]))}, {facts['threads']} cores ({facts['cpu']}), "
        f"Python {facts['python']}, torch {facts['versions']['torch']}; "
        f"{totals[0]:,} attempts, {sum(row[o] for row in found['rows'] for o in BAD)} of them not as they must be."
    )
    return f"{tables.markdown(header, [*rows, ['all', *totals, '']])}\n\n{said}"
