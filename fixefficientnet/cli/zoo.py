"""`list`, `info`."""

from dataclasses import asdict
from typing import Any

from fixefficientnet import manifest
from fixefficientnet.cli.app import AsJson, app, err, out, print_json, print_labelled, print_table
from fixefficientnet.manifest import Backbone, LocalWeights, Variant, Weights


@app.command(name="list")
def list_(filter: str = "", /, *, as_json: AsJson = False) -> None:
    """List the variants: size, the paper's top-1, and whether weights are published.

    Args:
        filter: Wildcard on the name, such as '*_ns'.
        as_json: Print JSON.
    """
    variants = [manifest.load()[key] for key in manifest.list_models(filter)]
    if as_json:
        print_json([_row(variant) for variant in variants])
        return
    if not variants:
        err.print(f"No variant matches {filter!r}.")
        raise SystemExit(1)
    rows = [
        (
            variant.key,
            f"{variant.parameters / 1e6:.1f}M",
            str(variant.test.size),
            f"{variant.paper.base.top1:.1f}" if variant.paper else "-",
            f"{variant.paper.fix.top1:.1f}" if variant.paper else "-",
            _published(variant),
        )
        for variant in variants
    ]
    print_table(("variant", "params", "test size", "paper base", "paper Fix", "FixRes weights"), rows)
    out.print("paper: ImageNet top-1 (%) as reported in arXiv 2003.08237, Tables 1 and 2")


@app.command
def info(name: str, /, *, as_json: AsJson = False) -> None:
    """Show everything the manifest knows about one variant.

    Args:
        name: Name or alias of a variant.
        as_json: Print JSON.
    """
    variant = manifest.find(name)
    if as_json:
        print_json(_row(variant))
        return
    test, backbone, paper, weights = variant.test, variant.backbone, variant.paper, variant.weights
    package = f", or the PyPI package {backbone.package.name}" if backbone.package else ""
    lines = {
        "variant": f"{variant.key} ({variant.title})",
        "timm name": variant.timm_name,
        "torch.hub": variant.hub_name,
        "parameters": f"{variant.parameters:,}",
        "backbone": backbone.name,
        "from": f"{backbone.repository}@{backbone.revision} on the Hub{package} ({backbone.license})",
        "pinned": _pinned(backbone),
        "train size": f"{variant.train_size}",
        "test size": f"{test.size}, crop_pct {test.crop_pct:g}, {test.interpolation}",
        "mean, std": f"{_triple(test.mean)}, {_triple(test.std)}",
    }
    if paper:
        lines["paper"] = (
            f"Table {paper.table}: top-1 {paper.base.top1} / top-5 {paper.base.top5} at {paper.base.test_size}, "
            f"with FixRes {paper.fix.top1} / {paper.fix.top5} at {paper.fix.test_size}"
        )
    lines["FixRes weights"] = _published(variant)
    if weights:
        lines["weights file"] = str(weights)
        lines["sha256"] = weights.sha256
        if measured := weights.measured:
            lines["measured"] = (
                f"top-1 {measured.top1} / top-5 {measured.top5} on {measured.images:,} images of {measured.dataset}"
            )
    if variant.note:
        lines["note"] = variant.note
    print_labelled(lines)


def _pinned(backbone: Backbone) -> str:
    if backbone.sha256:
        return f"sha256 {backbone.sha256}"
    if backbone.package:
        return f"from the Hub: no; from the package: sha256 {backbone.package.sha256}"
    return "no: whoever owns the repository may change the file"


def _published(variant: Variant) -> str:
    if variant.weights:
        return "local" if isinstance(variant.weights, LocalWeights) else "published"
    return "none (backbone only)" if variant.backbone_only else "not published yet"


def _triple(values: tuple[float, float, float]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"


def _row(variant: Variant) -> dict[str, Any]:
    names = {"key": variant.key, "hub_name": variant.hub_name, "timm_name": variant.timm_name}
    return names | asdict(variant) | {"published": isinstance(variant.weights, Weights)}
