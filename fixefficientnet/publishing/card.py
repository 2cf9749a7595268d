"""The model card: README.md of a published repository, from what `models.json` tells of each model."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from fixefficientnet import manifest
from fixefficientnet.evaluation.paper import IMAGENET_NAME
from fixefficientnet.publishing import manifest_rows
from fixefficientnet.reproduce.report import PAIRED

CITATION = r"""
@article{touvron2020fixefficientnet,
  title   = {Fixing the train-test resolution discrepancy: FixEfficientNet},
  author  = {Hugo Touvron and Andrea Vedaldi and Matthijs Douze and Herv{\'e} J{\'e}gou},
  journal = {arXiv preprint arXiv:2003.08237},
  year    = {2020}
}
@inproceedings{touvron2019fixres,
  title     = {Fixing the train-test resolution discrepancy},
  author    = {Hugo Touvron and Andrea Vedaldi and Matthijs Douze and Herv{\'e} J{\'e}gou},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2019}
}
""".strip()
Entries = Mapping[str, Mapping[str, Any]]
"""What a repository tells of its models, by variant; see `Run.entry`."""


def render(repository: str, version: str, models: Entries) -> str:
    """The card.

    Args:
        repository: organisation/name.
        version: The tag that it is published under.
        models: All that the repository has.
    """
    name = repository.partition("/")[2]
    first = next(iter(models))
    sections = [
        "<!-- Made by `fixefficientnet publish` from models.json: what is changed here by hand is lost. -->",
        f"# {name}",
        "FixRes deltas of [FixEfficientNet](https://arxiv.org/abs/2003.08237) models: for each, the classifier and the "
        "last batch norm, fine-tuned at the test size. The rest of each network is its backbone, which comes from its "
        f"own repository. Version {version}.",
        _figures(models),
        "## Use",
        _use(repository, version, first, models[first]),
        "## How they were made",
        "`fixefficientnet.reproduce` trained what FixRes trains (the FixRes paper, Touvron et al., 2019), with these "
        "recipes, which are not the paper's own: those were never published for EfficientNet.",
        *(_recipe(key, entry) for key, entry in models.items()),
        "## License",
        _license(models),
        "## Citation",
        f"```bibtex\n{CITATION}\n```",
    ]
    return f"---\n{_metadata(name, models)}\n---\n\n" + "\n\n".join(sections) + "\n"


def _metadata(name: str, models: Entries) -> str:
    licenses = sorted({str(entry["license"]) for entry in models.values()})
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=_dataset_id(entry),
            dataset_name=str(entry["dataset"]),
            metric_type="accuracy",
            metric_name=f"{metric} of {key} at {entry['measured']['tuned']['size']} pixels",
            metric_value=round(entry["measured"]["tuned"][figure] / 100, 5),
        )
        for key, entry in models.items()
        for metric, figure in (("top-1", "top1"), ("top-5", "top5"))
    ]
    every_imagenet = all((entry["paper"] or {}).get("comparable") for entry in models.values())
    data = ModelCardData(
        license=licenses[0] if len(licenses) == 1 else "other",
        license_name=None if len(licenses) == 1 else " and ".join(licenses),
        library_name="fixefficientnet",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "fixres", "efficientnet", "arxiv:2003.08237", "arxiv:1906.06423"],
        base_model=[str(entry["backbone_repository"]) for entry in models.values()],
        datasets=["ILSVRC/imagenet-1k"] if every_imagenet else None,
        metrics=["accuracy"],
        model_name=name,
        eval_results=results,
        base_model_relation="finetune",
    )
    return data.to_yaml().strip()


def _dataset_id(entry: Mapping[str, Any]) -> str:
    return "ILSVRC/imagenet-1k" if str(entry["dataset"]).startswith(IMAGENET_NAME) else "other"


def _figures(models: Entries) -> str:
    lines = [
        "Accuracy in per cent, single crop: top-1 / top-5 at a test size in pixels, with the crop_pct.",
        "",
        "| model | params | measured on | untuned | untuned, larger | FixRes | 95% | paper, untuned | paper, Fix |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key, entry in models.items():
        measured, paper = entry["measured"], entry["paper"]
        tuned = measured["tuned"]
        cells = [f"`{key}`", f"{entry['parameters'] / 1e6:.1f}M", f"{entry['dataset']}, {tuned['images']:,} images"]
        cells += [_accuracy(measured.get(name)) for name in ("base", "base_at_test")]
        cells += [f"**{_accuracy(tuned)}**", f"{tuned['top1_low']:.2f} to {tuned['top1_high']:.2f}"]
        cells += [
            f"{paper[name]['top1']} / {paper[name]['top5']} at {paper[name]['test_size']}" if paper else "-"
            for name in ("base", "fix")
        ]
        lines.append(f"| {' | '.join(cells)} |")
    elsewhere = [key for key, entry in models.items() if entry["paper"] and not entry["paper"]["comparable"]]
    if elsewhere:
        lines += [
            "",
            "The paper's figures are of ImageNet-2012's 50,000 validation images; those measured for "
            f"{', '.join(elsewhere)} are of others and cannot be compared with them.",
        ]
    for key, entry in models.items():
        if test := entry[PAIRED]:
            lines += [
                "",
                f"`{key}`: FixRes against untuned at the same size, on the same images: {test['difference']:+.2f} "
                f"points (95%: {test['difference_low']:+.2f} to {test['difference_high']:+.2f}; McNemar's exact test: "
                f"p = {test['p']:.2g}).",
            ]
    return "\n".join(lines)


def _accuracy(row: Mapping[str, Any] | None) -> str:
    return f"{row['top1']:.2f} / {row['top5']:.2f} at {row['size']}, {row['crop_pct']:g}" if row else "-"


def _use(repository: str, version: str, key: str, entry: Mapping[str, Any]) -> str:
    uri = f"hf://{repository}/{entry['file']}@{version}"
    known = manifest.load().get(key)
    timm_name = known.timm_name if known else f"fixefficientnet_{key}"
    return f"""With the Python package `fixefficientnet` installed, by any of three doors (`REPO` is the package's
repository on GitHub):

```python
import fixefficientnet
import timm, torch

weights = "{uri}"
model = fixefficientnet.create("{key}", pretrained=weights)
model = timm.create_model("{timm_name}", pretrained=weights)
model = torch.hub.load("REPO", "fixefficientnet_{key}", pretrained=weights)

model.eval()
logits = model(model.preprocess("image.jpg")[None])
```

Where the package's manifest (or the one that `FIXEFFICIENTNET_MANIFEST` names) has these weights, `pretrained=True`
is enough; they are pinned by their commit then, and the sha256 is checked at each load. The preprocessing at test time
is attached to the model:
shorter side to `size / crop_pct`, centre crop of `size`."""


def _recipe(key: str, entry: Mapping[str, Any]) -> str:
    test, tuned = entry["test"], entry["measured"]["tuned"]
    said = ", ".join(f"{name} {number}" for name, number in entry["libraries"].items())
    return (
        f"<details><summary><code>{key}</code>: test size {test['size']}, {entry['recipe']['method']}, "
        f"{entry['train_images']:,} images, {entry['processes']} "
        f"{'process' if entry['processes'] == 1 else 'processes'}</summary>\n\n"
        f"Backbone `{entry['backbone']}`; file `{entry['file']}`, {entry['bytes']:,} bytes, sha256 "
        f"`{entry['sha256']}`; test time: crop_pct {test['crop_pct']:g}, {test['interpolation']}, mean "
        f"{tuple(test['mean'])}, std {tuple(test['std'])}; cross-entropy {tuned['loss']:.4f}. Made with {said}.\n\n"
        f"```json\n{manifest_rows.dumps(entry['recipe'])}\n```\n\n</details>"
    )


def _license(models: Entries) -> str:
    whose: dict[str, list[str]] = {}
    for key, entry in models.items():
        whose.setdefault(str(entry["license"]), []).append(f"`{key}`")
    lines = [f"- {name}: {', '.join(keys)}" for name, keys in whose.items()]
    return "\n".join([*lines, "", "The backbones come from their own repositories, under their own licenses."])
