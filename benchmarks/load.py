"""Loading a model: `fixefficientnet.create` against timm, on the same local files; time, memory, bytes to download.

    python -m benchmarks load

Both sides read the backbone from one Hub cache, offline, in fresh processes that take turns; the median of the rounds
counts; imports are done before the clock starts. Ours also checks and applies a FixRes delta. The weights are random;
the Lite variants have no delta, and ours reads their real weights from the package that ships them.

Cold: the file has been dropped from the page cache; the clock runs until the first image (64 pixels) is through, as
our weights are read when first used. Warm: once more in the same process. Memory: growth of the process's peak, cold;
on CUDA too, as what differs are the copies on the setup there.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import machine

NAME = "load"

COMMIT = "0" * 40
SIDES = ("timm", "fixefficientnet")


def prepare(home: Path, key: str) -> dict[str, Any]:
    """A Hub cache with a random backbone of this variant and a delta for it; the environment that uses them."""
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
    if variant.backbone_only:  # no delta, and ours reads the package's file
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
        if given["side"] == "timm":
            return timm.create_model(variant.backbone.name, pretrained=True).eval().to(device)
        return fixefficientnet.create(variant.key, variant.usual_weights, device=device)

    with torch.inference_mode():
        timm.create_model("test_efficientnet").eval().to(device)(image)  # whatever a first model imports or sets up
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
    """One per variant and side."""
    import fixefficientnet

    every: list[machine.Row] = []
    for key in options.variants or fixefficientnet.list_models():
        with tempfile.TemporaryDirectory(prefix="fixefficientnet-load-") as home:
            ready = prepare(Path(home), key)
            given = {"variant": key, "files": ready["files"], "device": options.device}
            found = machine.in_turns(
                SIDES,
                options.rounds,
                lambda side: machine.fresh(NAME, {**given, "side": side}, ready["env"]),  # noqa: B023
                f"load {key}:",
            )
        medians = {
            side: {name: machine.median(findings, name) for name in findings[0]} for side, findings in found.items()
        }
        every += [
            {"benchmark": NAME, "variant": key, "setup": side, **ready["sizes"], **values}
            for side, values in medians.items()
        ]
    return every
