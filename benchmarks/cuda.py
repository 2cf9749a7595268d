r"""Runs the benchmarks on a GPU.

    python -m benchmarks.cuda --images DIR --train DIR --checkpoint FILE \
      --json speed-cuda.json
    python -m benchmarks.tables speed-cuda.json

Preprocessing and imports use no GPU: they are measured on that machine's CPU.
"""

import os

from benchmarks.runner import parser, run


def main() -> None:
    options = parser("python -m benchmarks.cuda", __doc__)
    options.set_defaults(threads=len(os.sched_getaffinity(0)))
    chosen = options.parse_args()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device here. `python -m benchmarks all` measures on the CPU.")
    chosen.device = "cuda"
    run(chosen)


if __name__ == "__main__":
    main()
