r"""Small images of unusual kinds for tests/cli/face.rs, written by Pillow.

    python scripts/odd_images.py tests/data/odd

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
    image, other = Image.fromarray(pixels), Image.new("RGB", (16, 8), (0, 255, 0))
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    image.save(folder / "progressive.jpg", quality=95, progressive=True)
    image.save(folder / "lossy.webp", quality=95)
    image.save(folder / "lossless.webp", lossless=True)
    image.save(folder / "animated.webp", save_all=True, append_images=[other], duration=100, lossless=True)
    image.save(folder / "animated.gif", save_all=True, append_images=[other], duration=100)
    image.save(folder / "animated.png", save_all=True, append_images=[other], duration=100)
    image.save(folder / "plain.gif")
    image.save(folder / "plain.bmp")
    image.save(folder / "lzw.tiff", compression="tiff_lzw")
    image.convert("P").save(folder / "palette.png")
    image.save(folder / "picture.avif")


if __name__ == "__main__":
    main(sys.argv[1])
