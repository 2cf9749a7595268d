"""Tests of the docs: tables, links, line lengths and Python code."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from fixefficientnet import delta, manifest

pytestmark = pytest.mark.newest

START, END = "<!-- models:", "<!-- end of models -->"


def models_table() -> dict[str, str]:
    """The lines of the README's table, by the variant's key."""
    lines = {}
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
        lines[v.key] = f"| {' | '.join(map(str, cells))} |"
    return lines


def test_readmes_table_is_the_manifests():
    """It has the paper's variants; others may be in it."""
    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index(START) : readme.index(END)].strip().split("\n")[3:]
    there = [line.split("`")[1] for line in table]
    keys = [key for key, variant in manifest.load().items() if variant.paper or key in there]
    expected = "\n".join(models_table()[key] for key in keys)
    assert "\n".join(table) == expected, "the README's table is stale; it must read:\n" + expected


PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")),
    *sorted((ROOT / "docs").glob("*.md")),
]


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


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def test_python_code_runs(tmp_path: Path):
    code = []
    for name in ("README.md", "docs/using.md", "docs/manifest.md"):
        found = [block for block in blocks(ROOT / name, "python") if 'create("b4_ns"' not in block]  # is on the Hub
        assert found
        code.append("\n".join(found))
    for name in ("examples", "hubconf.py", "fixefficientnet", "weights_manifest.json"):
        (tmp_path / name).symlink_to(ROOT / name)
    run = f"for code in {code!r}:\n    exec(code, {{}})"  # each page by itself
    done = subprocess.run([sys.executable, "-c", run], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_python_code_is_python():
    for page in PAGES:
        for block in blocks(page, "python"):
            ast.parse(block)


def test_the_page_on_versions_tells_those_of_the_code():
    told = dict(re.findall(r"^\| (the \w+) \| (\d+) \|", (ROOT / "docs" / "versions.md").read_text(), re.M))
    assert told == {"the manifest": str(manifest.SCHEMA_VERSION), "the delta": str(delta.FORMAT_VERSION)}


def test_lite_notes_tell_what_the_docs_measured():
    rows = dict(re.findall(r"^\| (lite\d) .*?\*\*(\d+)\*\*", (ROOT / "docs" / "evaluation.md").read_text(), re.M))
    for key, count in rows.items():
        note = manifest.load()[key].note
        assert note is not None and f"({count};" in note
    assert set(rows) == {"lite0", "lite1", "lite2"}
