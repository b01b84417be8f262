"""Segments a picture with a folder that `dfqsam export` wrote; needs openvino and numpy alone.

python openvino_client.py FOLDER IMAGE.npy MASK.npy (--point X Y | --box X0 Y0 X1 Y1)
IMAGE is [H, W] or [H, W, 3] uint8, MASK becomes [H, W] bool; (x, y) in pixels, a pixel's middle at +0.5.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.modules["openvino_telemetry"] = None  # without it, OpenVINO cannot report its use to its maker
import openvino as ov  # noqa: E402


def resizing(old, new, kernel="linear", antialias=False):  # a matrix [new, old]
    ratio, to, of = old / new, np.arange(new)[:, None], np.arange(old)
    if kernel == "nearest":
        return (of == np.floor(to * ratio)).astype(np.float32)
    middle = (to + 0.5) * ratio - 0.5
    if not antialias:
        middle, ratio = middle.clip(0, old - 1), 1
    away = np.abs(of - middle) / (ratio if kernel == "area" else max(1, ratio))  # in new pixels
    weights = np.maximum(1 - away, 0)
    if kernel == "area":  # what new and old pixel share
        weights = (0.5 + 0.5 / ratio - away).clip(0, min(1, 1 / ratio))
    if kernel == "cubic":
        outer = -0.5 * away**3 + 2.5 * away**2 - 4 * away + 2
        weights = np.where(away < 1, 1.5 * away**3 - 2.5 * away**2 + 1, outer) * (away < 2)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def resize(x, height, width, *how):  # [..., H, W]
    return resizing(x.shape[-2], height, *how) @ x @ resizing(x.shape[-1], width, *how).T


def prepare(image, size, pixels):  # [1, 3, S, S], and (height, width) of the image in it
    x = np.moveaxis(image if image.ndim == 3 else image[:, :, None].repeat(3, 2), 2, 0).astype(np.float32)
    longest = max(x.shape[1:]) if pixels["keep_aspect"] else 0
    inner = [max(1, int(side * size / (longest or side) + 0.5)) for side in x.shape[1:]]
    y = resize(x, *inner, pixels["kernel"], pixels["antialias"]).clip(x.min(), x.max())
    if pixels["values"] == "min_max":
        y = np.floor(y + 0.5) if pixels["kernel"] == "area" else y
        y = (y - y.min()) / max(y.max() - y.min(), 1e-8)
    else:
        y = (y - np.reshape(pixels["mean"], (3, 1, 1))) / np.reshape(pixels["std"], (3, 1, 1))
    return np.pad(y, [(0, 0), *((0, size - side) for side in inner)])[None].astype(np.float32), inner


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("paths", nargs=3, type=Path, metavar=("FOLDER", "IMAGE", "MASK"))
    parser.add_argument("--point", nargs=2, type=float)
    parser.add_argument("--box", nargs=4, type=float)
    options = parser.parse_args()
    folder, source, target = options.paths
    image, model = np.load(source), json.loads((folder / "model.json").read_text())
    size, exact = model["input_size"], {"INFERENCE_PRECISION_HINT": "f32"}
    encoder, decoder = (
        ov.Core().compile_model(folder / f"{name}.xml", "CPU", exact) for name in ("encoder", "decoder")
    )
    begin = time.perf_counter()
    images, inner = prepare(image, size, model["pixels"])
    embedding = encoder(images)[0]
    middle = time.perf_counter()
    scale = inner[1] / image.shape[1], inner[0] / image.shape[0]
    points = np.reshape(options.box or options.point, (1, -1, 2)) * scale - 0.5
    labels = np.array([[2, 3] if options.box else [1]], dtype=np.float32)
    answer = decoder([embedding, points.astype(np.float32), labels])
    logits = resize(answer["masks"][0, answer["best"][0]], size, size)[: inner[0], : inner[1]]
    mask = resize(logits, *image.shape[:2]) > 0
    end = time.perf_counter()
    np.save(target, mask)
    print(f"image {middle - begin:.3f} s, prompt {end - middle:.3f} s, {mask.sum()} pixels")


main()
