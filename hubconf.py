"""torch.hub's entry points, one per variant, made from the manifest's rows.

torch.hub.list(REPO), torch.hub.help(REPO, "fixefficientnet_b4_ns"), torch.hub.load(REPO, "fixefficientnet_b4_ns")
"""

import hashlib as _hashlib
import sys as _sys
from pathlib import Path as _Path
from typing import Any as _Any

import fixefficientnet as _package
from fixefficientnet.manifest import Variant as _Variant
from fixefficientnet.manifest import load as _load

dependencies = ["torch", "torchvision", "timm", "huggingface_hub", "safetensors"]


def _digest(package: _Path) -> str:
    """Of all that decides what a copy of the package does: code, manifest, recipes."""
    files = {file.relative_to(package).as_posix(): file for file in package.rglob("*.py")}
    files = {name: file for name, file in files.items() if not name.startswith(".") and "/." not in name}
    for name in ("weights_manifest.json", "recipes.toml"):  # in an installed package, beside it in a checkout
        files[name] = next((file for file in (package / name, package.parent / name) if file.is_file()), package)
    digest = _hashlib.sha256()
    for name, file in sorted(files.items()):
        content = file.read_bytes().replace(b"\r\n", b"\n") if file.is_file() else b""
        digest.update(name.encode() + b"\0" + _hashlib.sha256(content).digest())
    return digest.hexdigest()


def _check_copy() -> None:
    """Refuses to go on with another copy's code: Python imports a package once, whoever asks for it next.

    Raises:
        ImportError: The process has loaded another copy; says which. A copy that was imported directly is taken to be
            what lies on disk now.
    """
    own, loaded = _Path(__file__).resolve().parent, _Path(_package.__file__ or "").resolve().parent
    wanted = _digest(own / "fixefficientnet")
    # kept from the first time: torch.hub may since have put another revision in the same place
    found = _package.__dict__.setdefault("_digest", wanted if loaded.parent == own else _digest(loaded))
    if found != wanted:
        raise ImportError(
            f"This process has loaded fixefficientnet {_package.__version__} from {loaded.parent} already, and {own} "
            "holds another one. Restart it (in a notebook, the kernel), and load from this one first."
        )
    if str(own) not in _sys.path[1:]:  # torch.hub takes its entry away again; processes that are spawned look here
        _sys.path.append(str(own))


_check_copy()


def _entrypoint(variant: _Variant) -> _Any:
    def build(pretrained: bool | str = True, **kwargs: _Any) -> _Any:
        from fixefficientnet import create

        return create(variant.key, pretrained, **kwargs)

    test, paper = variant.test, variant.paper
    if paper:
        published = "published" if variant.weights else "not published yet"
        result = (
            f"Paper (Table {paper.table}): top-1 {paper.fix.top1} at {paper.fix.test_size} pixels with FixRes, "
            f"{paper.base.top1} at {paper.base.test_size} without. FixRes weights: {published}."
        )
    else:
        result = str(variant.note)
    build.__name__ = build.__qualname__ = variant.hub_name
    build.__doc__ = f"""{variant.title}: {variant.parameters / 1e6:.1f}M parameters, test size {test.size}.

    {result}

    Args:
        pretrained: True (FixRes weights), "backbone" (the original {variant.backbone.name}
            weights), a delta's path, hf://org/repo/file.safetensors@revision, or False (random).
        **kwargs: num_classes, in_chans, features_only, device, dtype, cache_dir, and timm's own.

    Returns:
        timm's model in eval mode, with `preprocess` (image -> float32 [3, {test.size}, {test.size}]),
        `variant` and `pretrained_cfg`.
    """
    return build


globals().update({_variant.hub_name: _entrypoint(_variant) for _variant in _load().values()})
