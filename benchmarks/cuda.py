r"""Runs the benchmarks on a GPU.

    python -m benchmarks.cuda --images DIR --train DIR --checkpoint FILE \
      --json speed-cuda.json
    python -m benchmarks.tables speed-cuda.json

Preprocessing and imports use no GPU: they are measured on that machine's CPU.

    python -m benchmarks.cuda --check --train DIR --json check.json

checks in ten minutes at most that a GPU does what fine-tuning needs, and what
it takes: correctness, memory, rates. It needs no network.
"""

import os

from benchmarks.check import command
from benchmarks.runner import parser, run


def main() -> None:
    options = parser("python -m benchmarks.cuda", __doc__)
    options.set_defaults(threads=len(os.sched_getaffinity(0)))
    options.add_argument("--check", action="store_true", help="check the GPU instead")
    options.add_argument(
        "--only", nargs="+", choices=command.PARTS, metavar="PART", help=f"of the check: {', '.join(command.PARTS)}"
    )
    options.add_argument("--dry-run", action="store_true", help="check tiny networks on the CPU: that the code runs")
    chosen = options.parse_args()
    import torch

    chosen.device = "cpu" if chosen.dry_run else "cuda"
    if not chosen.dry_run and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device here. `python -m benchmarks all` measures on the CPU.")
    if chosen.check:
        command.run(chosen)
    elif chosen.only or chosen.dry_run:
        options.error("--only and --dry-run go with --check.")
    else:
        run(chosen)


if __name__ == "__main__":
    main()
