"""python -m train.prepare NAME [--data_dir=...] [--manual_dir=...]: a data set, once.

The embedded set needs nothing. The others need TensorFlow while they are prepared, in
an environment of their own; what they leave is read without it.
"""

from ibsgl_jax.app.interrupt import exit_on_interrupt

if __name__ == "__main__":  # what follows takes seconds
    exit_on_interrupt()

import importlib.util
import re
from pathlib import Path

from absl import app, flags

from train import command
from train.data import sources
from train.errors import DatasetError, UserError

# NAME/CONFIG:VERSION, the last two at will.
NAME = r"[A-Za-z_][A-Za-z0-9_]{0,99}(/[A-Za-z0-9_.+-]{1,99})?(:[0-9.*]{1,20})?"
# Files that tfds does not download itself.
MANUAL = {
    "imagenet2012": ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"),
}
NEEDS = (
    "pip install tensorflow-cpu tensorflow-datasets array_record pillow "
    "importlib_resources jax"
)

_DATA_DIR = flags.DEFINE_string(
    "data_dir", "runs/data", "Where the prepared data goes; config.data_dir."
)
_MANUAL_DIR = flags.DEFINE_string(
    "manual_dir", None, "Where files lie that must be fetched by hand."
)


def prepare(name, data_dir, manual_dir=None) -> str:
    """Prepare a data set as array_record; returns what was done, in one line.

    Raises:
      DatasetError: something is missing; the message says what and what to do.
    """
    if not re.fullmatch(NAME, name):
        raise DatasetError(f"{name!r} is no name of a data set, such as cifar10")
    try:
        builder = sources.prepare(name, data_dir)
        return f"{name} is prepared in {builder.data_path}"
    except DatasetError:
        if name.partition("/")[0] in sources.EMBEDDED:
            raise  # made here; TensorFlow would not help
    if importlib.util.find_spec("tensorflow") is None:
        raise DatasetError(
            f"preparing {name} needs TensorFlow, once; in an environment of its own: "
            f"{NEEDS}; then repeat this command there"
        )
    files = MANUAL.get(name.split("/")[0], ())
    missing = [f for f in files if not (manual_dir and Path(manual_dir, f).exists())]
    if missing:
        raise DatasetError(
            f"{name} needs {' and '.join(missing)} from its publisher; give their "
            "folder as --manual_dir"
        )
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise DatasetError(str(error).splitlines()[0]) from error
    options = tfds.download.DownloadConfig(manual_dir=manual_dir)
    builder.download_and_prepare(download_config=options)
    return f"{name} is prepared in {builder.data_path}"


@command.run
def main(argv):
    if len(argv) != 2:
        raise UserError("usage: python -m train.prepare NAME")
    for flag in (_DATA_DIR, _MANUAL_DIR):
        if flag.value is not None:
            command.check_folder(flag.name, flag.value)
    print(prepare(argv[1], _DATA_DIR.value, _MANUAL_DIR.value))
    return 0


if __name__ == "__main__":
    app.run(main, flags_parser=command.make_parser())
