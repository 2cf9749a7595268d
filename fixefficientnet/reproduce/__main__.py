"""`python -m fixefficientnet.reproduce` is the command `fixefficientnet reproduce`."""

import sys

from fixefficientnet.cli import main as command_line


def main() -> None:
    """Runs the command with the arguments of the process."""
    command_line(["reproduce", *sys.argv[1:]])


if __name__ == "__main__":
    main()
