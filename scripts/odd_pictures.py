r"""Small pictures of unusual kinds for tests/cli/face.rs, written by Pillow.

    python scripts/odd_pictures.py tests/data/odd

Each shows the same 16x8 pixels: the left half red, the right half blue.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image


def main(folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8, 0] = pixels[:, 8:, 2] = 255
    picture, other = Image.fromarray(pixels), Image.new("RGB", (16, 8), (0, 255, 0))
    picture.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    picture.save(folder / "progressive.jpg", quality=95, progressive=True)
    picture.save(folder / "lossy.webp", quality=95)
    picture.save(folder / "lossless.webp", lossless=True)
    picture.save(folder / "animated.webp", save_all=True, append_images=[other], duration=100, lossless=True)
    picture.save(folder / "animated.gif", save_all=True, append_images=[other], duration=100)
    picture.save(folder / "animated.png", save_all=True, append_images=[other], duration=100)
    picture.save(folder / "plain.gif")
    picture.save(folder / "plain.bmp")
    picture.save(folder / "lzw.tiff", compression="tiff_lzw")
    picture.convert("P").save(folder / "palette.png")
    picture.save(folder / "picture.avif")


if __name__ == "__main__":
    main(sys.argv[1])
