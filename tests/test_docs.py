import re

from conftest import ROOT

from fixefficientnet import manifest

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


def test_links_in_the_docs_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_lite_notes_tell_what_the_docs_measured():
    rows = dict(re.findall(r"^\| (lite\d) .*?\*\*(\d+)\*\*", (ROOT / "docs" / "evaluation.md").read_text(), re.M))
    for key, count in rows.items():
        assert f"({count};" in manifest.load()[key].note
    assert set(rows) == {"lite0", "lite1", "lite2"}
