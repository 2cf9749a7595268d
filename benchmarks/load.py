"""Loading a model: `fixefficientnet.create` beside `timm.create_model`; time, memory, bytes to download.

    python -m benchmarks load

Both read the backbone from the same Hub cache, offline, in fresh processes that take turns. The median of the rounds
counts. Imports are done before the clock starts. fixefficientnet also checks and applies a FixRes delta. The weights
are random. The Lite variants have no delta; fixefficientnet reads their real weights from the package that ships them.

The clock runs until the first image (64 pixels) is through, because mapped weights are read when they are first used.
Cold: the files were dropped from the page cache. Warm: the model is loaded once more in the same process. Memory is the
growth of the process's peak when cold; on CUDA too, where the copies on the host are what differs.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import machine

NAME = "load"

COMMIT = "0" * 40
METHODS = ("timm", "fixefficientnet")


def prepare(home: Path, key: str) -> dict[str, Any]:
    """Makes a Hub cache with a random backbone and a delta; returns the environment, files and sizes for it."""
    import safetensors.torch
    import timm

    import fixefficientnet
    from fixefficientnet import delta, hub

    variant = fixefficientnet.info(key)
    repository = home / "hub" / f"models--{variant.backbone.repository.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    model = timm.create_model(variant.backbone.name)
    weights = snapshot / "model.safetensors"
    safetensors.torch.save_file(model.state_dict(), weights)
    env = {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_OFFLINE": "1"}
    if variant.backbone_only:  # it has no delta, and fixefficientnet reads the file that the package ships
        packaged = hub.backbone_file(variant.backbone)
        sizes = {"backbone_bytes": packaged.stat().st_size, "delta_bytes": 0}
        return {"env": env, "files": [str(weights), str(packaged)], "sizes": sizes}
    base = {name: tensor.clone() for name, tensor in delta.find_head(model).select(model.state_dict()).items()}
    tuned = delta.extract(model, base=base, variant=key, backbone=variant.backbone.name)
    path = home / f"{key}.safetensors"
    rows = {key: {"weights": {"path": path.name, "sha256": delta.save(tuned, path)}}}
    manifest = home / f"{key}.json"
    manifest.write_text(json.dumps({"schema_version": 1, "variants": rows}))
    env["FIXEFFICIENTNET_MANIFEST"] = str(manifest)
    sizes = {"backbone_bytes": weights.stat().st_size, "delta_bytes": path.stat().st_size}
    return {"env": env, "files": [str(weights), str(path)], "sizes": sizes}


def evict(path: str) -> None:
    """Drops a file from the page cache."""
    import os

    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def child(given: dict[str, Any]) -> dict[str, Any]:
    import timm
    import torch

    import fixefficientnet
    import fixefficientnet.zoo

    variant = fixefficientnet.info(given["variant"])
    device: str = given["device"]
    image = torch.zeros(1, 3, 64, 64, device=device)

    def load() -> Any:
        if given["method"] == "timm":
            return timm.create_model(variant.backbone.name, pretrained=True).eval().to(device)
        return fixefficientnet.create(variant.key, variant.usual_weights, device=device)

    with torch.inference_mode():
        timm.create_model("test_efficientnet").eval().to(device)(image)  # a first model imports and sets up more
    found = {}
    for state in ("cold", "warm"):
        if state == "cold":
            for path in given["files"]:
                evict(path)
        before = machine.forget_peak()
        start = machine.settled(device)
        model = load()
        found[f"{state}_create"] = machine.settled(device) - start
        with torch.inference_mode():
            model(image)
        found[state] = machine.settled(device) - start
        found[f"{state}_megabytes"] = machine.grown_since(before)
        del model
    return found


def rows(options: argparse.Namespace) -> list[machine.Row]:
    """Measures loading; one row per variant and library."""
    import fixefficientnet

    every: list[machine.Row] = []
    for key in options.variants or fixefficientnet.list_models():
        with tempfile.TemporaryDirectory(prefix="fixefficientnet-load-") as home:
            ready = prepare(Path(home), key)
            given = {"variant": key, "files": ready["files"], "device": options.device}
            found = machine.in_turns(
                METHODS,
                options.rounds,
                lambda method: machine.fresh(NAME, {**given, "method": method}, ready["env"]),  # noqa: B023
                f"load {key}:",
            )
        medians = {
            method: {name: machine.median(findings, name) for name in findings[0]} for method, findings in found.items()
        }
        every += [
            {"benchmark": NAME, "variant": key, "method": method, **ready["sizes"], **values}
            for method, values in medians.items()
        ]
    return every
