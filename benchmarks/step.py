r"""One step of the online method on a GPU: images/s and peak memory, beside what `--plan` says of it.

    python -m benchmarks.step b0:512 b2:512:bf16 b7:64:bf16

Each argument is VARIANT:BATCH or VARIANT:BATCH:PRECISION. Weights and images are random. The last column is the
largest difference of the logits of the whole batch from those of its parts of 32, relative to the largest logit.
"""

import argparse
import time
from typing import Any

import fixefficientnet


def measure(key: str, batch: int, precision: str) -> dict[str, Any]:
    """Figures of a step; the second one is timed."""
    import timm
    import torch
    from torch.nn import functional as F

    from fixefficientnet.reproduce import network, plan, recipe
    from fixefficientnet.reproduce.chunks import StepNetwork

    chosen = {"batch_size": batch, "mixed_precision": precision}
    resolved = recipe.resolve(recipe.subject_of_variant(fixefficientnet.info(key)), chosen)
    torch.manual_seed(0)
    model: Any = timm.create_model(resolved.backbone.partition(".")[0])
    model = model.cuda().to(memory_format=torch.channels_last)
    net = network.prepare(model, resolved)
    step_network = StepNetwork(net, resolved)
    net.train(resolved)
    images = torch.randint(256, (batch, 3, resolved.test_size, resolved.test_size), dtype=torch.uint8, device="cuda")
    images = images.contiguous(memory_format=torch.channels_last)
    targets = torch.randint(1000, (batch,), device="cuda")
    autocast = torch.autocast("cuda", torch.float16 if precision == "fp16" else torch.bfloat16, precision != "no")

    def step() -> None:
        with autocast:
            logits = step_network(images)
        F.cross_entropy(logits.float(), targets).backward()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()

    step()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step()
    seconds, peak = time.perf_counter() - start, torch.cuda.max_memory_allocated()
    model.eval()
    with torch.no_grad(), autocast:
        whole = model(images).float()
        parts = torch.cat([model(part).float() for part in images.split(32)])  # type: ignore[no-untyped-call]
    difference = float((whole - parts).abs().max() / parts.abs().max())
    return {
        "images_per_second": batch / seconds,
        "peak": peak / 1e9,
        "plan": plan.plan(resolved).memory / 1e9,
        "difference": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="+", metavar="VARIANT:BATCH[:PRECISION]")
    cases = parser.parse_args().cases
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device here.")
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {cudnn}\n")
    print("| variant | batch | precision | images/s | peak memory | --plan | difference |")
    print("|---|---:|---|---:|---:|---:|---:|")
    for case in cases:
        key, batch, *precision = case.split(":")
        row = measure(key, int(batch), *precision or ["no"])
        print(
            f"| {key} | {batch} | {(precision or ['no'])[0]} | {row['images_per_second']:,.0f} | {row['peak']:.1f} GB "
            f"| {row['plan']:.1f} GB | {row['difference']:.0e} |"
        )
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
