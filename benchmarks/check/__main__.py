"""Runs one part in this process, and prints each row as a line of JSON: python -m benchmarks.check PART SETTING."""

import importlib
import json
import os
import sys
import traceback

from benchmarks.check.setting import Setting, said
from benchmarks.machine import Row


def main() -> None:
    name, setting = sys.argv[1], Setting(**json.loads(sys.argv[2]))
    rows = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed, by a C library too, is no row

    def show(row: Row) -> None:
        print(json.dumps(row), file=rows, flush=True)

    with rows:
        try:
            for row in importlib.import_module(f"benchmarks.check.{name}").rows(setting):
                show(row)
        except Exception as error:
            traceback.print_exc()
            show({"failed": said(error)})


if __name__ == "__main__":
    main()
