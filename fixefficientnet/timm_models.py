"""The zoo's variants in timm's own model registry, such as `fixefficientnet_b4.ns_jft_in1k`.

Importing this package must neither import timm (listing models would take seconds) nor leave the names
unknown to `timm.create_model`. So they are registered immediately if timm is imported already, and
otherwise as soon as it is.
"""

import importlib.abc
import sys
import warnings
from collections import defaultdict
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fixefficientnet import manifest
from fixefficientnet._internal import requirements
from fixefficientnet.errors import ManifestError
from fixefficientnet.manifest import Variant

if TYPE_CHECKING:
    from timm.models import DefaultCfg, PretrainedCfg
    from torch import nn

__all__: list[str] = []  # timm adds the entry points' names
default_cfgs: dict[str, "DefaultCfg"] = {}  # timm looks its configs up here


def register_with_timm() -> None:
    """Registers all variants now, or as soon as timm is imported."""
    ours = __name__, _AfterTimm.__qualname__  # by name: a copy that was imported before has another class of it
    for finder in [one for one in sys.meta_path if (type(one).__module__, type(one).__qualname__) == ours]:
        sys.meta_path.remove(finder)
    finder = _AfterTimm()
    sys.meta_path.insert(0, finder)  # before looking: another thread may be about to import timm
    if "timm" in sys.modules:
        finder.registers()


def _register() -> None:
    import timm  # noqa: F401 - waits for another thread that is importing it, which importing timm.models would not
    from timm.models import generate_default_cfgs, is_model, register_model

    by_architecture: dict[str, list[Variant]] = defaultdict(list)
    for variant in manifest.load().values():
        by_architecture[variant.architecture].append(variant)
    for architecture, variants in by_architecture.items():
        default = manifest.find(architecture)  # what the name means without a tag
        siblings = sorted(variants, key=lambda variant: variant is not default)
        cfgs: dict[str, Any] = {f"{v.timm_name}{'*' if v is default else ''}": v.pretrained_cfg() for v in siblings}
        default_cfgs.update(generate_default_cfgs(cfgs))
        with warnings.catch_warnings():
            if is_model(architecture):  # after a reload; timm warns of names that are taken
                warnings.simplefilter("ignore", UserWarning)
            register_model(_entrypoint(architecture, siblings))


def _names_other_weights(cfg: "PretrainedCfg", variant: Variant) -> bool:
    """Whether timm was told of other weights than the manifest's row has."""
    own = variant.pretrained_cfg()
    hub = (cfg.hf_hub_id, cfg.hf_hub_filename) != (own.hf_hub_id, own.hf_hub_filename)
    return bool(hub or cfg.source or cfg.file or cfg.url or cfg.state_dict)


def _entrypoint(architecture: str, siblings: list[Variant]) -> Any:
    """The entry point of an architecture; of its variants, the first is what it means without a tag."""

    def build(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: str | None = None,
        **kwargs: Any,
    ) -> "nn.Module":
        requirements.need(*requirements.MODELS)
        import timm
        from timm.models import resolve_pretrained_cfg

        from fixefficientnet import zoo

        cfg = resolve_pretrained_cfg(architecture, pretrained_cfg, pretrained_cfg_overlay)
        variant = next((v for v in siblings if v.backbone.tag == cfg.tag), siblings[0])
        if pretrained and _names_other_weights(cfg, variant):
            # whole checkpoints that someone made of such a model (hf-hub:, local-dir:, file, url): timm's business
            model = timm.create_model(
                variant.backbone.architecture, pretrained=True, pretrained_cfg=cfg, cache_dir=cache_dir, **kwargs
            )
            return zoo.attach(model, variant)
        return zoo.build(variant, pretrained, cfg=cfg, cache_dir=cache_dir, **kwargs)

    build.__name__ = build.__qualname__ = architecture
    build.__module__ = __name__
    build.__doc__ = f"{siblings[0].title}, and its siblings by tag; see `fixefficientnet.create`."
    return build


class _AfterTimm(importlib.abc.MetaPathFinder):
    """Finds timm as the finders behind it do, and registers the variants when its models have been imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        finders = list(sys.meta_path)
        # timm.models too: another thread may have asked for timm just before this finder was there
        if name not in ("timm", "timm.models") or self not in finders:
            return None
        # only those behind it: two such finders that asked all others would ask each other for ever
        behind = finders[finders.index(self) + 1 :]
        asked = (finder.find_spec(name, path, target) for finder in behind if hasattr(finder, "find_spec"))
        spec = next(filter(None, asked), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loading(spec.loader, self)
        return spec

    def registers(self) -> None:
        """Registers the variants, unless that is done.

        Whatever goes wrong with these names, it may break neither `import timm` nor `import fixefficientnet`.
        """
        if self not in sys.meta_path:
            return
        sys.meta_path.remove(self)
        try:
            try:
                _register()
            except (AttributeError, ImportError, TypeError):
                requirements.need("timm")  # an old one lacks what registering takes
                raise
        except (AttributeError, ImportError, ManifestError, TypeError) as error:
            warnings.warn(f"The FixEfficientNet names are not registered with timm: {error}", stacklevel=2)


class _Loading(importlib.abc.Loader):
    """A loader, unchanged but for what comes after it; the module never sees this one."""

    def __init__(self, own: Any, finder: _AfterTimm):
        self._own, self._finder = own, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._own.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__:
            module.__spec__.loader = self._own
        module.__loader__ = self._own
        self._own.exec_module(module)
        self._finder.registers()
