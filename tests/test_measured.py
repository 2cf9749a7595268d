"""The docs' counts on real pictures, where these are at hand (they are not part of the project)."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

FOLDER = os.environ.get("FIXEFFICIENTNET_IMAGENET_SAMPLE", "")


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER, reason="FIXEFFICIENTNET_IMAGENET_SAMPLE names no folder of n01440764/… with pictures")
def test_lite0_counts_are_the_documented_ones():
    command = ["-m", "benchmarks.sample_accuracy", FOLDER, "--model", "lite0", "--at", "224:0.875", "--at", "320:1"]
    out = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = [int(count) for count in re.findall(r": (\d+) of 500", out)]
    row = re.search(r"^\| lite0 \| (\d+) \(224.*", (ROOT / "docs" / "measured.md").read_text(), re.M)
    at_320 = row[0].split("|")[6].strip(" *")
    assert found == pytest.approx([int(row[1]), int(at_320)], abs=1)  # one picture on the edge, by processor
