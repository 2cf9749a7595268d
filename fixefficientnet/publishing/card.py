"""The model card: README.md of a published repository, a template filled with what models.json tells of each model."""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from fixefficientnet import manifest
from fixefficientnet._internal import records
from fixefficientnet.evaluation.paper import IMAGENET_NAME
from fixefficientnet.publishing import manifest_rows
from fixefficientnet.publishing.index import Index, PublishedModel

FILENAME = "README.md"
IMAGENET_DATASET = "ILSVRC/imagenet-1k"
"""ImageNet's name on the Hub."""


def render(repository: str, index: Index) -> bytes:
    """The model card of a repository.

    Args:
        repository: ORGANISATION/NAME.
        index: All models of the repository.
    """
    first, licenses = next(iter(index.models)), _licenses(index)
    known = manifest.load().get(first)
    template = Path(__file__).with_name("card.md.jinja")
    card = ModelCard.from_template(
        _metadata(repository, index, list(licenses)),
        template_str=template.read_text(encoding="utf-8"),
        name=repository.partition("/")[2],
        repository=repository,
        version=index.version,
        models=index.models,
        first=first,
        timm_name=known.timm_name if known else f"{manifest.PREFIX}_{first}",
        not_comparable=[key for key, model in index.models.items() if model.paper and not model.comparable],
        recipes={key: manifest_rows.dumps(records.to_json(model.recipe)) for key, model in index.models.items()},
        licenses=licenses,
    )
    return f"{str(card).rstrip()}\n".encode()


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
        tags=["image-classification", "timm", "fixres", "efficientnet", "arxiv:2003.08237", "arxiv:1906.06423"],
        base_model=[model.backbone_repository for model in models.values()],
        datasets=[IMAGENET_DATASET] if every_imagenet else None,
        metrics=["accuracy"],
        model_name=repository.partition("/")[2],
        eval_results=[result for key, model in models.items() for result in _results(key, model)],
        base_model_relation="finetune",
    )


def _results(key: str, model: PublishedModel) -> list[EvalResult]:
    """Top-1 and top-5 of a model, as shares in [0, 1]."""
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=IMAGENET_DATASET if model.dataset.startswith(IMAGENET_NAME) else "other",
            dataset_name=model.dataset,
            metric_type="accuracy",
            metric_name=f"{metric} of {key} at {model.tuned.size} pixels",
            metric_value=round(accuracy / 100, 5),
        )
        for metric, accuracy in (("top-1", model.tuned.top1), ("top-5", model.tuned.top5))
    ]
