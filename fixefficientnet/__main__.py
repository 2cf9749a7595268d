"""`python -m fixefficientnet` is the command `fixefficientnet`."""

from fixefficientnet.cli import main

main()
