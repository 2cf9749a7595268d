r"""Runs benchmarks on this machine.

    python -m benchmarks all --images DIR --train DIR --checkpoint FILE \
      --json docs/results/speed.json
    python -m benchmarks load start --json docs/results/speed.json
    python -m benchmarks.tables docs/results/speed.json

The figures of the named benchmarks replace those in the file; figures of other
benchmarks stay. The file must be of the same machine and versions. `all` leaves
out a benchmark whose folder was not given.
"""

import importlib
import json
import sys

from benchmarks import machine
from benchmarks.runner import BENCHMARKS, parser, run


def main() -> None:
    if sys.argv[1:2] == [machine.CHILD]:
        print(json.dumps(importlib.import_module(f"benchmarks.{sys.argv[2]}").child(json.loads(sys.argv[3]))))
        return
    options = parser("python -m benchmarks", __doc__)
    options.add_argument(
        "names", nargs="+", choices=["all", *BENCHMARKS], metavar="NAME", help=f"all, {', '.join(BENCHMARKS)}"
    )
    chosen = options.parse_args()
    chosen.device = "cpu"
    run(chosen, None if "all" in chosen.names else chosen.names)


if __name__ == "__main__":
    main()
