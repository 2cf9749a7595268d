"""`env`."""

from dataclasses import asdict
from typing import Any

from fixefficientnet._internal import environment
from fixefficientnet._internal.environment import Environment
from fixefficientnet.cli.app import AsJson, app, print_json, print_labelled


@app.command
def env(*, as_json: AsJson = False) -> None:
    """Show what a bug report needs: releases, processor, GPUs, folders.

    Args:
        as_json: Print JSON.
    """
    found = environment.look()
    if as_json:
        print_json(asdict(found))
        return
    print_labelled(_lines(found))


def _lines(found: Environment) -> dict[str, str]:
    complete = [extra for extra, missing in found.extras.items() if not missing]
    lines = {
        "fixefficientnet": f"{found.fixefficientnet} in {found.folder}",
        "Python": found.python,
        "system": found.system,
        "CPU": f"{found.cpu}, {found.cores} {'core' if found.cores == 1 else 'cores'}",
        "torch": _torch(found.torch),
        "packages": ", ".join(f"{name} {release or 'missing'}" for name, release in found.packages.items()),
        "extras": ", ".join(complete) or "none",
    }
    for number, gpu in enumerate(found.torch.get("gpus", [])):
        lines[f"GPU {number}"] = f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_gib']} GiB"
    lines |= {f"cache, {name}": folder for name, folder in found.caches.items()}
    return lines | found.variables


def _torch(told: dict[str, Any]) -> str:
    if "error" in told:
        return f"cannot be used: {told['error']}"
    cuda = f"CUDA {told['cuda']}, cuDNN {told['cudnn']}" if told["cuda"] else "without CUDA"
    gpus = "" if told["gpus"] else ", no GPU"
    return "; ".join([f"{cuda}{gpus}, {told['threads']} threads, {told['instructions']}", *told["warnings"]])
