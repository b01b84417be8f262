"""What the embedded model makes of images, behind docs/accuracy/README.md.

python docs/accuracy/measure_entropies.py real FOLDER   images of FOLDER/manifest.jsonl: entropies, ranges and
                                                        class response; rewrites what the report compares with
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
from monailabel_dfqsam.synthesis.measures import measure
from monailabel_dfqsam.synthesis.patch_similarity import encoder_patch_entropies

PHANTOMS = 48
SHARES = (1.0, 0.3, 0.1, 0.03)
SEEDS = (11, 12)


def real(folder: Path) -> None:
    """Means over the images of a manifest, as the report reads them."""
    checkpoint = read_checkpoint()
    sam = build(checkpoint)
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    images = [np.array(Image.open(folder / row["image"]).convert("RGB")) for row in rows]
    found = measure(sam, torch.cat([to_input(sam.variant, x)[0] for x in images]), embedded_auxiliary())
    numbers = {
        "weights_sha256": checkpoint.sha256,
        "images": len(images),
        "entropies": [round(value, 4) for value in found.entropies],
        "response": round(found.response, 4),
        "ranges": {name: [round(end, 4) for end in ends] for name, ends in found.ranges.items()},
    }
    REAL_IMAGES.write_text(json.dumps(numbers, indent=1) + "\n")


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
