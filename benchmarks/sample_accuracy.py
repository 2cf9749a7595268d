"""Top-1 count of a variant's backbone weights on a folder of pictures, one subfolder per WordNet id.

    python -m benchmarks.sample_accuracy FOLDER --model lite0 --at 224:0.875 --at 320:1.0

Each `--at SIZE:CROP_PCT` is one line of the result. Pictures are mapped to classes by WordNet id.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from timm.data import ImageNetInfo

import fixefficientnet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="lite0")
    parser.add_argument("--at", action="append", metavar="SIZE:CROP_PCT", required=True)
    options = parser.parse_args()
    info = ImageNetInfo("imagenet-1k")
    index = {info.index_to_label_name(i): i for i in range(1000)}
    files = sorted(path for path in options.folder.glob("*/*") if path.suffix.lower() in (".jpeg", ".jpg"))
    if not files:
        raise SystemExit(f"There are no pictures in {options.folder}/*/: give the folder that holds the n01440764, …")
    if unknown := sorted({path.parent.name for path in files} - set(index)):
        raise SystemExit(f"These folders are no ImageNet-1k WordNet ids: {', '.join(unknown[:5])}")
    targets = torch.tensor([index[path.parent.name] for path in files])
    model = fixefficientnet.create(options.model, "backbone").to(memory_format=torch.channels_last)
    for at in options.at:
        size, crop_pct = at.split(":")
        preprocess = replace(model.preprocess, size=int(size), crop_pct=float(crop_pct))
        right = 0
        for start in range(0, len(files), 32):
            pictures = torch.stack([preprocess(path) for path in files[start : start + 32]])
            with torch.inference_mode():
                found = model(pictures.to(memory_format=torch.channels_last)).argmax(1)
            right += int((found == targets[start : start + 32]).sum())
        print(f"{options.model} at {size}, crop_pct {crop_pct}: {right} of {len(files)}", flush=True)


if __name__ == "__main__":
    main()
