"""Tests of the docs: tables, links, line lengths and Python code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from fixefficientnet import manifest

pytestmark = pytest.mark.newest

START, END = "<!-- models:", "<!-- end of models -->"


def models_table() -> str:
    lines = []
    for v in manifest.load().values():
        base, fix = "-", "-"
        if v.paper:
            base, fix = f"{v.paper.base.top1:.1f} at {v.paper.base.test_size}", f"{v.paper.fix.top1:.1f}"
        weights = "published" if v.weights else "none (backbone only)" if v.backbone_only else "not yet"
        cells = (
            f"`{v.key}`",
            f"`{v.backbone.name}`",
            f"{v.parameters / 1e6:.1f}M",
            v.train_size,
            base,
            fix,
            v.test.size,
            weights,
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def test_readmes_table_is_the_manifests():
    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index(START) : readme.index(END)].strip().split("\n", 3)[3]
    assert table == models_table(), "the README's table is stale; it must read:\n" + models_table()


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_in_the_docs_lead_somewhere():
    for page in PAGES:
        for target, _, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#([^)]+))?\)", page.read_text()):
            there = page.parent / target if target else page
            assert there.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(there), f"{page.name} links to {target}#{anchor}"
        for source in re.findall(r'<img src="([^"]+)"', page.read_text()):
            assert (page.parent / source).exists(), f"{page.name} shows {source}"


def test_lines_of_the_docs_are_not_long():
    for page in PAGES:
        for line in page.read_text().splitlines():
            assert len(line) <= 120 or line.startswith("| "), f"{page.name}: {line}"


@pytest.mark.parametrize("page", ["README.md", "docs/manifest.md"])
def test_python_code_runs(page: str, tmp_path: Path):
    code = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    runs = [block for block in code if 'create("b4_ns"' not in block]  # its backbone is on the Hub
    assert runs
    for name in ("examples", "hubconf.py", "fixefficientnet", "weights_manifest.json"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run([sys.executable, "-c", "\n".join(runs)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_lite_notes_tell_what_the_docs_measured():
    rows = dict(re.findall(r"^\| (lite\d) .*?\*\*(\d+)\*\*", (ROOT / "docs" / "evaluation.md").read_text(), re.M))
    for key, count in rows.items():
        note = manifest.load()[key].note
        assert note is not None and f"({count};" in note
    assert set(rows) == {"lite0", "lite1", "lite2"}
