"""Runs the campaign; its modules are imported as the tests import them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from campaign.command import main

if __name__ == "__main__":
    main()
