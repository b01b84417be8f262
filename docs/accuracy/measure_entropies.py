"""Patch-similarity entropies behind docs/accuracy/README.md.

python docs/accuracy/measure_entropies.py real FOLDER   images of FOLDER/manifest.jsonl under the embedded
                                                        weights; rewrites what the report compares with
python docs/accuracy/measure_entropies.py colour        synthesized images beside phantoms, for several
                                                        shares of colour kept
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from monailabel_dfqsam.config import SynthesisConfig, silent
from monailabel_dfqsam.pretraining.targets import PhantomDataset
from monailabel_dfqsam.report import REAL_IMAGES
from monailabel_dfqsam.sam import build, read_checkpoint
from monailabel_dfqsam.sam.preprocess import normalize, to_input
from monailabel_dfqsam.synthesis import synthesize
from monailabel_dfqsam.synthesis.auxiliary import embedded_auxiliary
from monailabel_dfqsam.synthesis.patch_similarity import encoder_patch_entropies

PHANTOMS = 48
SHARES = (1.0, 0.3, 0.1, 0.03)
SEEDS = (11, 12)


def real(folder: Path) -> None:
    """Mean and deviation over the images of a manifest."""
    checkpoint = read_checkpoint()
    sam = build(checkpoint)
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    images = [np.array(Image.open(folder / row["image"]).convert("RGB")) for row in rows]
    found = torch.cat(
        [encoder_patch_entropies(sam.image_encoder, to_input(sam.variant, image)[0]) for image in images]
    )
    numbers = {
        "weights_sha256": checkpoint.sha256,
        "images": len(found),
        "mean": [round(value, 4) for value in found.mean(0).tolist()],
        "deviation": [round(value, 4) for value in found.std(0).tolist()],
    }
    REAL_IMAGES.write_text(json.dumps(numbers) + "\n")


def colour() -> None:
    """Distance of synthesized images' entropies from phantoms'."""
    sam = build(read_checkpoint())
    phantoms = torch.stack([example["image"] for example in islice(PhantomDataset(seed=77), PHANTOMS)])
    target = encoder_patch_entropies(sam.image_encoder, normalize(phantoms * 255)).mean(0)
    for share in SHARES:
        synthesize.COLOUR = share
        for seed in SEEDS:
            made = synthesize.synthesize(
                sam,
                SynthesisConfig(iterations=300),
                images=1,
                seed=seed,
                auxiliary=embedded_auxiliary(),
                progress=silent,
            )
            found = encoder_patch_entropies(sam.image_encoder, made.images)[0]
            print(share, seed, round(float((found - target).abs().mean()), 3))


if __name__ == "__main__":
    if sys.argv[1:] == ["colour"]:
        colour()
    elif len(sys.argv) == 3 and sys.argv[1] == "real":
        real(Path(sys.argv[2]))
    else:
        raise SystemExit(__doc__)
