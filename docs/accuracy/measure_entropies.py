"""What the embedded model makes of images, behind docs/accuracy/README.md.

python docs/accuracy/measure_entropies.py real FOLDER   images of FOLDER/manifest.jsonl: entropies, ranges and
                                                        class response; rewrites what the report compares with
python docs/accuracy/measure_entropies.py colour        synthesized images beside phantoms, for several
                                                        shares of colour kept
python docs/accuracy/measure_entropies.py bound         the same with and without a bound on entropy, for
                                                        short and long synthesis

Rows of the last two: what, iterations, seed, distance of patch-similarity entropies from phantoms', share of
the layers' ranges that both have, class response, agreement of W4A4 masks on other phantoms, time.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from monailabel_dfqsam.config import QuantizationConfig, SynthesisConfig, silent
from monailabel_dfqsam.engines import load_encoder
from monailabel_dfqsam.fidelity import FidelityTest
from monailabel_dfqsam.pipeline import pack, phantom_entropies, phantom_images
from monailabel_dfqsam.quantization.calibrate import calibrate
from monailabel_dfqsam.report import REAL_IMAGES
from monailabel_dfqsam.sam import VARIANTS, build, read_checkpoint
from monailabel_dfqsam.sam.preprocess import to_input
from monailabel_dfqsam.synthesis import synthesize
from monailabel_dfqsam.synthesis.auxiliary import embedded_auxiliary
from monailabel_dfqsam.synthesis.measures import mean_overlap, measure

PHANTOMS = 32
PHANTOM_SEED = 1 << 41
SHARES = (1.0, 0.3, 0.1, 0.03)
ITERATIONS = (300, 1500)
SEEDS = (11, 12, 13)


def real(folder: Path) -> None:
    """Means over the images of a manifest, as the report reads them."""
    checkpoint = read_checkpoint("tiny")
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


class Bench:
    """Says how near synthesized images come to phantoms that training never saw, and what that is worth."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.checkpoint = read_checkpoint("tiny")
        self.sam = build(self.checkpoint)
        self.auxiliary = embedded_auxiliary()
        self.ceiling = phantom_entropies(self.sam)
        self.target = measure(self.sam, phantoms(0, PHANTOMS), self.auxiliary)
        self.test = FidelityTest(self.sam)

    def line(self, name: str, seed: int, config: SynthesisConfig) -> None:
        """Prints a row of the table: distance of entropies, shared ranges, agreement of W4A4 masks."""
        started = time.monotonic()
        images = synthesize.synthesize(
            self.sam,
            config,
            images=1,
            seed=seed,
            auxiliary=self.auxiliary,
            ceiling=self.ceiling if config.bounded else None,
            progress=silent,
        ).images
        seconds = time.monotonic() - started
        found = measure(self.sam, images, self.auxiliary)
        distance = np.abs(np.subtract(found.entropies, self.target.entropies)).mean()
        shared = mean_overlap(found.ranges, self.target.ranges)
        way = QuantizationConfig(synthesis=config, seed=seed)
        quantized = calibrate(self.sam.image_encoder, images, way.bits, way.policy, way.recipe, silent)
        encoder = load_encoder(pack(self.checkpoint, way, self.sam, quantized, images))
        agreement = self.test.measure(encoder.embed)["mean_iou"]
        print(
            f"| {name} | {config.iterations} | {seed} | {distance:.3f} | {shared:.3f} | {found.response:.2f} "
            f"| {agreement:.4f} | {seconds:.0f} s |",
            flush=True,
        )


def phantoms(first: int, count: int) -> torch.Tensor:
    """[N, 3, S, S] float32, as the model takes them, of seeds far from those of training."""
    return phantom_images(VARIANTS["tiny"], range(PHANTOM_SEED + first, PHANTOM_SEED + first + count))


def colour() -> None:
    """Shares of colour that synthesis keeps."""
    bench = Bench()
    for share in SHARES:
        synthesize.COLOUR = share
        for seed in SEEDS:
            bench.line(f"colour {share}", seed, SynthesisConfig(iterations=300))


def bound() -> None:
    """Entropy worth driving up to phantoms' only, or without end."""
    bench = Bench()
    for iterations, seed, bounded in product(ITERATIONS, SEEDS, (False, True)):
        config = SynthesisConfig(iterations=iterations, bounded=bounded)
        bench.line("bounded" if bounded else "the paper", seed, config)


if __name__ == "__main__":
    if sys.argv[1:] in (["colour"], ["bound"]):
        {"colour": colour, "bound": bound}[sys.argv[1]]()
    elif len(sys.argv) == 3 and sys.argv[1] == "real":
        real(Path(sys.argv[2]))
    else:
        raise SystemExit(__doc__)
