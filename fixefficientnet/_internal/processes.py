"""Devices, processes and precision, by Accelerate: one process, or those of torchrun and `accelerate launch`."""

import contextlib
import datetime
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fixefficientnet._internal import compat, requirements, waiting
from fixefficientnet.errors import FixEfficientNetError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

_PATIENCE = datetime.timedelta(days=1)
"""How long a process waits for others: they wait while the first trains on features."""


def usable_device(device: "str | torch.device | None") -> "torch.device":
    """A device, after a check that PyTorch can compute on it here; None: cuda if there is one, else cpu.

    Raises:
        FixEfficientNetError: There is no such device here.
    """
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise FixEfficientNetError(
            f"The device {str(device)!r} cannot be used here: {reason}. Use --device cpu, or leave it out."
        ) from None
    return torch.device(device)


def check_precision(mixed_precision: str, *, cpu: bool) -> None:
    """Refuses a precision that is none of "no", "bf16" and "fp16", and fp16 on a CPU, by a FixEfficientNetError."""
    if mixed_precision not in ("no", "bf16", "fp16"):
        raise FixEfficientNetError(f"--mixed-precision {mixed_precision}: it is no, bf16 or fp16.")
    if cpu and mixed_precision == "fp16":
        raise FixEfficientNetError("fp16 is for CUDA devices; on a CPU, there is bf16.")


def usual_precision(device: str | None) -> str:
    """The precision that a frozen network runs in on a device, if none is chosen.

    That is "bf16" on "cuda" where the GPU has it (None: cuda if there is one), else "no".
    """
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "no"  # Ampere: older cards emulate it


def accelerator(device: str | None, mixed_precision: str) -> "Accelerator":
    """Accelerate's view of this command's processes, devices ("cpu", "cuda"; None: cuda if there is one) and precision.

    Raises:
        FixEfficientNetError: The device or the precision cannot be used here; torchrun restarted processes of several
            nodes, which cannot find each other.
    """
    requirements.need("accelerate", "torchmetrics")  # what begins here ends in accuracies
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    if device not in (None, "cpu", "cuda"):
        raise FixEfficientNetError(f"--device {device}: it is cpu or cuda; which one, CUDA_VISIBLE_DEVICES says.")
    if device == "cuda" and not torch.cuda.is_available():
        raise FixEfficientNetError("--device cuda: there is no CUDA device here. Use --device cpu, or leave it out.")
    cpu = device == "cpu" or (device is None and not torch.cuda.is_available())
    check_precision(mixed_precision, cpu=cpu)
    handlers: list[Any] = [
        DistributedDataParallelKwargs(broadcast_buffers=False),  # statistics are averaged instead
        InitProcessGroupKwargs(timeout=_PATIENCE),
    ]
    _join("gloo" if cpu else "nccl")
    try:
        return Accelerator(cpu=cpu, mixed_precision=mixed_precision, kwargs_handlers=handlers)
    except ValueError as error:  # Accelerate's state is the process's
        raise FixEfficientNetError(
            f"Accelerate runs with another device or precision in this process already ({error}). Use the same one, "
            "or a process of its own."
        ) from error


def _join(backend: str) -> None:
    """Joins the processes that a launcher started, within the time that others are waited for.

    Accelerate takes what it finds. By itself it would wait for them as long as for a collective call, a day.

    torchrun's store holds the addresses of processes that it restarted still, and who reads these waits for them
    (https://github.com/pytorch/pytorch/issues/135712): so each attempt has a store of its own. Of several nodes, each
    counts its own restarts, so that the count names no common store.

    Raises:
        FixEfficientNetError: The others did not come; or torchrun restarted processes of several nodes.
    """
    import torch.distributed as dist

    if not several() or dist.is_initialized():
        return
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if attempt != "0" and shared and os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        raise FixEfficientNetError(
            "Processes that torchrun restarts on several nodes cannot find each other. Start torchrun with "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment; the run continues where it was."
        )
    if not {"MASTER_ADDR", "MASTER_PORT", "RANK"} <= os.environ.keys():
        return  # Accelerate says what is missing
    patience = datetime.timedelta(seconds=waiting.longest())
    try:
        store, number, world = next(dist.rendezvous("env://", timeout=patience))
        store.set_timeout(_PATIENCE)
        own = dist.PrefixStore(f"attempt {attempt}", store)
        dist.init_process_group(backend, store=own, rank=number, world_size=world, timeout=_PATIENCE)
    except RuntimeError as error:
        raise FixEfficientNetError(
            f"Not all {os.environ['WORLD_SIZE']} processes of this command came within {waiting.longest():g} s "
            f"({waiting.VARIABLE} sets how long), at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: "
            f"{str(error).splitlines()[0]}"
        ) from error


@contextlib.contextmanager
def accelerating(device: str | None, mixed_precision: str) -> Iterator["Accelerator"]:
    """An `accelerator` for a while: Accelerate's state, one for the process, is left as it was found."""
    requirements.need("accelerate")
    ours = not compat.accelerate_is_set_up()
    try:
        yield accelerator(device, mixed_precision)
    finally:
        if ours and not several():  # else device and precision would hold for all that comes after
            compat.forget_accelerate()


def default_workers() -> int:
    """Number of loading processes of this process: its share of the cores it may use.

    Of what `srun` starts, each process may use the cores of its own task only.
    """
    return max(1, usable_cores() // local_processes())


def usable_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_processes() -> int:
    """Number of this command's processes on this machine, as torchrun or `accelerate launch` says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank() -> int:
    """This process's rank, as its launcher says; known before any accelerator is."""
    return int(os.environ.get("RANK", "0"))


def several() -> bool:
    """Whether a launcher started more than one process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def leave(status: int) -> None:
    """Ends this process immediately, as others may wait for it in a collective call, and it for them on exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
