"""The model card: README.md of a published repository, of deltas or of a whole model; or before there are weights."""

import json
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader

from fixefficientnet import manifest
from fixefficientnet._internal import records
from fixefficientnet._internal.text import code, inert, markdown
from fixefficientnet.evaluation.outcome import Summary
from fixefficientnet.evaluation.paper import IMAGENET_NAME
from fixefficientnet.models import LoadedModel
from fixefficientnet.publishing import manifest_rows
from fixefficientnet.publishing.index import Index
from fixefficientnet.reproduce.recipe import Recipe
from fixefficientnet.reproduce.report import TITLES, Report

FILENAME = "README.md"
IMAGENET_DATASET = "ILSVRC/imagenet-1k"
"""ImageNet's name on the Hub."""
_TAGS = ["image-classification", "timm", "fixres", "efficientnet", "arxiv:2003.08237", "arxiv:1906.06423"]


def render(repository: str, index: Index) -> bytes:
    """The model card of a repository of deltas: a template filled with what models.json tells of each model."""
    first, licenses = next(iter(index.models)), _licenses(index)
    known = manifest.load().get(first)
    return _filled(
        "card.md.jinja",
        _metadata(repository, index, list(licenses)),
        name=repository.partition("/")[2],
        repository=repository,
        version=index.version,
        models=index.models,
        first=first,
        timm_name=known.timm_name if known else f"{manifest.PREFIX}_{first}",
        not_comparable=[key for key, model in index.models.items() if model.paper and not model.comparable],
        recipes={key: _recipe(model.recipe) for key, model in index.models.items()},
        licenses=licenses,
    )


def planned() -> dict[str, bytes]:
    """The model cards of the paper's models that have no published weights yet, by timm's name.

    They name the paper's figures as the paper's, and no result: what is measured comes with the weights.
    """
    return {
        variant.timm_name: _filled(
            "planned_card.md.jinja",
            ModelCardData(
                license=variant.backbone.license,
                library_name="timm",
                pipeline_tag="image-classification",
                tags=_TAGS,
                base_model=variant.backbone.repository,
                base_model_relation="finetune",
                datasets=[IMAGENET_DATASET],
            ),
            variant=variant,
        )
        for variant in manifest.load().values()
        if variant.paper and not variant.weights
    }


def render_model(repository: str, loaded: LoadedModel, license: str, report: Report | None) -> bytes:
    """The model card of a repository with one whole model, with the report of the run that made it, if there is one.

    The license (SPDX identifier, lower case, or "unknown") is that of a network of one's own; a variant has its
    backbone's.
    """
    name = repository.partition("/")[2]
    dataset = dataset_name(report) if report else ""
    final = list(report.measured.values())[-1] if report else None
    spdx = loaded.variant.backbone.license if loaded.variant else license
    data = ModelCardData(
        license=None if spdx == "unknown" else spdx,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "transformers", *(["fixres", "arxiv:1906.06423"] * loaded.tuned)],
        base_model=_base_model(loaded, report),
        metrics=["accuracy"] if final else None,
        model_name=name,
        eval_results=_accuracies(final, dataset, f"at {final.size} pixels") if final else None,
    )
    return _filled(
        "whole_card.md.jinja",
        data,
        name=name,
        repository=repository,
        loaded=loaded,
        report=report,
        titles=TITLES,
        dataset=dataset,
        # JSON with an indent: no name of a class begins a line, so none ends the block
        classes=_escaped(json.dumps(loaded.own_classes, indent=1, ensure_ascii=False)) if loaded.own_classes else "",
        recipe=_recipe(report.recipe) if report else "",
    )


def _filled(template: str, data: ModelCardData, **values: Any) -> bytes:
    """A template of this folder, filled."""
    for name, value in vars(data).items():  # YAML has all letters as they are
        setattr(data, name, [*map(inert, value)] if isinstance(value, list) else inert(value))
    # the template says what escapes each value, in Markdown; citation.bib is a template too: no {{ and no {# in it
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent))  # noqa: S701
    environment.filters |= {"md": markdown, "code": code}
    card = ModelCard(environment.get_template(template).render(card_data=data.to_yaml(), **values))
    return f"{str(card).rstrip()}\n".encode("utf-8", "replace")


def _recipe(recipe: Recipe) -> str:
    return _escaped(manifest_rows.dumps(records.to_json(recipe)))


def _escaped(text: str) -> str:
    """JSON in lines, in which what would change the text around it is escaped, as JSON does."""
    return "".join(one if one == "\n" or inert(one) == one else json.dumps(one)[1:-1] for one in text)


def dataset_name(report: Report) -> str:
    """Name of the images that a run was measured on, without places on this machine."""
    if report.comparable:
        return f"{IMAGENET_NAME}, validation"
    path = PurePath(report.validation_data)
    skipped = 3 if path.parts[1:2] in (("home",), ("Users",)) else 1  # /home/NAME names the user
    return "/".join(path.parts[skipped if path.is_absolute() else 0 :][-2:]) or "images of one's own"


def _base_model(loaded: LoadedModel, report: Report | None) -> str | None:
    """Repository of the weights that a model was made of, on the Hub; None if not known."""
    if loaded.variant:
        return loaded.variant.backbone.repository
    started = report.recipe.weights == "pretrained" if report else not loaded.own_weights
    return f"timm/{loaded.timm_name}" if started and "." in loaded.timm_name else None


def _licenses(index: Index) -> dict[str, list[str]]:
    """Keys of the models by license."""
    found: dict[str, list[str]] = {}
    for key, model in index.models.items():
        found.setdefault(model.license, []).append(key)
    return dict(sorted(found.items()))


def _metadata(repository: str, index: Index, licenses: list[str]) -> ModelCardData:
    models = index.models
    every_imagenet = all(model.comparable for model in models.values())
    return ModelCardData(
        license=licenses[0] if len(licenses) == 1 else "other",
        license_name=None if len(licenses) == 1 else " and ".join(licenses),
        library_name="fixefficientnet",
        pipeline_tag="image-classification",
        tags=_TAGS,
        base_model=[model.backbone_repository for model in models.values()],
        datasets=[IMAGENET_DATASET] if every_imagenet else None,
        metrics=["accuracy"],
        model_name=repository.partition("/")[2],
        eval_results=[
            result
            for key, model in models.items()
            for result in _accuracies(model.tuned, model.dataset, f"of {key} at {model.tuned.size} pixels")
        ],
        base_model_relation="finetune",
    )


def _accuracies(row: Summary, dataset: str, where: str) -> list[EvalResult]:
    """Top-1 and top-5 of a model, as shares in [0, 1]."""
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=IMAGENET_DATASET if dataset.startswith(IMAGENET_NAME) else "other",
            dataset_name=inert(dataset),
            metric_type="accuracy",
            metric_name=f"{metric} {where}",
            metric_value=round(accuracy / 100, 5),
        )
        for metric, accuracy in (("top-1", row.top1), ("top-5", row.top5))
    ]
