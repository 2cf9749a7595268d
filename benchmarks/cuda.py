"""The same on a GPU: classifying, the fine-tuning step and methods, what each variant costs.

    python -m benchmarks.cuda --pictures FOLDER --train FOLDER --checkpoint FILE --json speed-cuda.json
    python -m benchmarks.tables speed-cuda.json

What has no GPU in it (preprocessing, loading, the command line) is not taken.
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
    run(["cost", "classify", "finetune"], chosen)


if __name__ == "__main__":
    main()
