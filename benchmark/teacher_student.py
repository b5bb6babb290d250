"""Teacher beside student while the student learns, from a run folder of emd_imagenet.py, as one animated picture.

    python benchmark/teacher_student.py OUT.gif RUN_FOLDER

Left the teacher's samples (many network evaluations each), right the student's (one each) of the same noise, a class in
each column, from the run's media/: up to 12 of its sample pictures, evenly spaced, the last one held longer.
"""

import argparse
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np


def frames(media: Path, count: int = 12, width: int = 640) -> np.ndarray:
    """UInt8[T, H, W, 3], each picture reduced by whole numbers until `width` holds it."""
    teacher = sorted(media.glob("teacher_*.png"))
    students = sorted(media.glob("samples_*.png"), key=lambda path: int(path.stem.split("_")[1]))
    if not teacher or not students:
        sys.exit(f"teacher_student.py: {media} has no teacher_*.png and samples_*.png")
    picks = np.unique(np.linspace(0, len(students) - 1, min(count, len(students))).round().astype(int))
    left, *right = (imageio.imread(path, mode="RGB") for path in (teacher[0], *(students[i] for i in picks)))
    every = -(-left.shape[1] // width)  # media are enlarged by repeating pixels, so every nth shows as much
    gap = np.full((left.shape[0], 16 * every, 3), 255, np.uint8)
    return np.stack([np.concatenate([left, gap, one], axis=1)[::every, ::every] for one in right])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT.gif")
    parser.add_argument("folder", metavar="RUN_FOLDER", type=Path)
    flags = parser.parse_args(argv)
    images = frames(flags.folder / "media")
    durations = [500] * (len(images) - 1) + [3000]  # milliseconds
    imageio.imwrite(flags.out, images, duration=durations if len(images) > 1 else durations[0], loop=0)


if __name__ == "__main__":
    main(sys.argv[1:])
