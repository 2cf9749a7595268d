"""Time and peak memory of loading a model: `fixefficientnet.create` against timm, on the same local files.

    python -m benchmarks.load                # b0, b7 and l2
    python -m benchmarks.load b4_ns --repeat 9

Both sides read the backbone from one Hub cache, offline, in fresh processes that take turns; the imports
are done before the clock starts. Ours also checks and applies a FixRes delta. The weights are random.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

COMMIT = "0" * 40

MEASURE = """
import sys, time, timm, torch, fixefficientnet, fixefficientnet.zoo
side, key = sys.argv[1:]
variant = fixefficientnet.info(key)
timm.create_model("test_efficientnet")  # whatever a first model imports or sets up
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forget the peak so far

def kilobytes(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))

before = kilobytes("VmRSS")
start = time.perf_counter()
if side == "timm":
    model = timm.create_model(variant.backbone.name, pretrained=True)
else:
    model = fixefficientnet.create(key, pretrained=True)
seconds = time.perf_counter() - start
print(seconds, (kilobytes("VmHWM") - before) / 1024)
"""


def prepare(home: Path, key: str) -> dict[str, str]:
    """A Hub cache with a random backbone of this variant and a delta for it; the environment that uses them."""
    import safetensors.torch
    import timm

    import fixefficientnet
    from fixefficientnet import delta

    variant = fixefficientnet.info(key)
    repository = home / "hub" / f"models--{variant.backbone.repository.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    model = timm.create_model(variant.backbone.name)
    safetensors.torch.save_file(model.state_dict(), snapshot / "model.safetensors")
    base = {name: tensor.clone() for name, tensor in delta.find_head(model).select(model.state_dict()).items()}
    tuned = delta.extract(model, base=base, variant=key, backbone=variant.backbone.name)
    digest = delta.save(tuned, home / f"{key}.safetensors")
    rows = {key: {"weights": {"path": f"{key}.safetensors", "sha256": digest}}}
    manifest = home / f"{key}.json"
    manifest.write_text(json.dumps({"schema_version": 1, "variants": rows}))
    return os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "FIXEFFICIENTNET_MANIFEST": str(manifest)}


def measure(side: str, key: str, env: dict[str, str]) -> tuple[float, float]:
    """Seconds and growth of peak memory in MB, in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, side, key], env=env, capture_output=True, text=True, check=True
    )
    seconds, megabytes = done.stdout.split()
    return float(seconds), float(megabytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", default=["b0", "b7", "l2"])
    parser.add_argument("--repeat", type=int, default=7, help="fresh processes per side; the median counts")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    results = {}
    print(f"median of {options.repeat} fresh processes, warm page cache, {os.cpu_count()} cores")
    print(f"{'':7}{'timm':>18}{'fixefficientnet':>20}")
    print(f"{'':7}{'s':>9}{'MB':>9}{'s':>11}{'MB':>9}{'faster':>9}")
    for key in options.variants:
        with tempfile.TemporaryDirectory(prefix="fixefficientnet-load-") as home:
            env = prepare(Path(home), key)
            measured = [(measure("timm", key, env), measure("ours", key, env)) for _ in range(options.repeat)]
        timm, ours = (
            [statistics.median(values) for values in zip(*side, strict=True)] for side in zip(*measured, strict=True)
        )
        ratio = timm[0] / ours[0]
        print(f"{key:7}{timm[0]:9.3f}{timm[1]:9.0f}{ours[0]:11.3f}{ours[1]:9.0f}{ratio:8.1f}x", flush=True)
        results[key] = {"timm": timm, "fixefficientnet": ours, "ratio": ratio}
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
