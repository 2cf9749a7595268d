"""What has no public name in the libraries that this package stands on, or another one in their older releases.

Each may move with an upgrade. Nothing else in the package uses a private name of another library (a test looks).
Imports a library only when one of its names is asked for.
"""

import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor, nn
    from torch.export import ExportedProgram


def freezing() -> AbstractContextManager[None]:
    """Within, torch.compile folds weights into the code.

    Its public `options` take effect too late for that: torch looks at this one before it calls the backend.
    """
    import torch._inductor.config

    return cast("AbstractContextManager[None]", torch._inductor.config.patch(freezing=True))


def compile_package(program: "ExportedProgram", path: "Path", metadata: "Mapping[str, str]") -> None:
    """Compiles a program to native code, in a package that torch documents, by functions without a public name."""
    import torch._inductor

    with freezing():  # which lays the weights out as the kernels want them
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs={"aot_inductor.metadata": dict(metadata)}
        )


def load_package(path: "Path") -> "Callable[[Tensor], Tensor]":
    """Loads what `compile_package` wrote, whose native code runs from then on."""
    import torch._inductor

    return cast("Callable[[Tensor], Tensor]", torch._inductor.aoti_load_package(str(path)))


def names_in_archive(path: "Path") -> list[str]:
    """Names of what is in a file of torch's, as torch itself reads them; runs nothing of it."""
    import zipfile

    import torch

    try:
        return torch._C.PyTorchFileReader(str(path)).get_all_records()
    except RuntimeError:  # a plain archive, as torch before 2.8 writes and reads them
        return zipfile.ZipFile(path).namelist()


def has_hooks(module: "nn.Module") -> bool:
    """Whether a module's forward pass is watched; torch registers hooks in public, and counts them nowhere."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def showing_results(see: "Callable[[Tensor], None]") -> AbstractContextManager[Any]:
    """Within, `see` is shown each tensor that an operation gives, of backward passes too."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Showing(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    see(leaf)
            return result

    return Showing()  # type: ignore[no-untyped-call]


def accelerate_is_set_up() -> bool:
    """Whether Accelerate has its state, one for the process; its public `initialized` would set it up."""
    from accelerate.state import AcceleratorState

    return bool(AcceleratorState._shared_state)


def forget_accelerate() -> None:
    """Removes Accelerate's state; there is only a private function for it, which its own tests use."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def dataset_fingerprint(dataset: object) -> str | None:
    """The hash that the package datasets keeps of a dataset's content; None where there is none."""
    return getattr(dataset, "_fingerprint", None)


def network_error() -> type[Exception]:
    """What huggingface_hub lets through where the network fails: since 1.0 httpx's, of its own name, else requests'."""
    from huggingface_hub.errors import HTTPError

    requests = sys.modules.get("requests")  # which it has imported, where it uses it
    before: type[Exception] = requests.RequestException if requests else HTTPError
    return before if issubclass(HTTPError, before) else HTTPError


def expect_any_device(norm: "nn.Module") -> None:
    """Lets a batch norm through SyncBatchNorm's forward, which asks itself for checks that only it has."""
    checked = cast(Any, norm)
    checked._check_input_dim = lambda inputs: None
    checked._check_non_zero_input_channels = lambda inputs: None
