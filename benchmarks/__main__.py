r"""Runs benchmarks on this machine.

    python -m benchmarks all --images DIR --train DIR --checkpoint FILE \
      --json docs/results/speed.json
    python -m benchmarks load start --json docs/results/speed.json
    python -m benchmarks.tables docs/results/speed.json

Figures of the benchmarks named take the place of those that the file has from
the same machine; the others stay. Of all, what lacks its folder is left out.
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
