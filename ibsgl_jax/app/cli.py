"""The command line of ``ibsgl``: its flags, and what each command does with them.

Every error of the user's is one line on stderr and exit status 2; photos that cannot be
read do not keep the others from being explained.
"""

import argparse
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ibsgl_jax import attribution, images, models, pretrained, tapping
from ibsgl_jax.app import classifier, explain, export, terminal, trainer
from ibsgl_jax.errors import UserError

MAX_SEED = 2**63 - 1
MAX_CHUNK = 1024


class _Parser(argparse.ArgumentParser):
    """One whose errors are one line, like every other."""

    def error(self, message):
        raise UserError(f"{message} (see `{self.prog} --help`)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    return terminal.run(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if "" not in sys.path:  # a model of one's own may lie here, as for python -m;
        sys.path.append("")  # last, so that nothing here hides a package
    if words and words[0] in trainer.COMMANDS:  # they have their own flags
        return trainer.run(words[0], words[1:])
    for word in words:
        if word.startswith("--") and word.endswith("=--"):  # argparse drops the "--"
            raise UserError(f"the value of {word[2:-3]} is missing")
    arguments = vars(_parser().parse_args(words))
    command = arguments.pop("command")
    for name, value in arguments.items():
        _check_text(name, value)
    return command(**arguments)


def _check_text(name: str, value) -> None:
    """UserError for values that name nothing on any system."""
    for text in value if isinstance(value, list) else [value]:
        if text == "":
            raise UserError(f"the value of {name} is empty")
        if isinstance(text, str) and "\0" in text:
            raise UserError(f"the value of {name} holds a zero byte")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ibsgl", description="Explain what a classifier sees in your photos."
    )
    commands = parser.add_subparsers(
        required=True,
        metavar="COMMAND",
        description=f"Training has its own: {', '.join(trainer.COMMANDS)}.",
    )

    explaining = commands.add_parser(
        "explain", help="draw attribution maps over photos"
    )
    explaining.set_defaults(command=_explain)
    explaining.add_argument(
        "photos",
        nargs="+",
        metavar="PHOTO",
        help="files, folders, wildcards, pipes; - for standard input",
    )
    _add_model_options(explaining)
    explaining.add_argument(
        "--method",
        default="ib,grad_cam",
        metavar="NAMES",
        help=f"comma-separated, of: {', '.join(attribution.METHODS)} "
        "(default: %(default)s)",
    )
    explaining.add_argument(
        "--class",
        dest="target",
        metavar="N|NAME",
        help="the class to explain (default: the predicted one of each photo)",
    )
    explaining.add_argument(
        "--fit",
        choices=images.FITS,
        help="crop: the central square; squash: the whole photo, its aspect lost "
        "(default: as a run's photos were, else crop)",
    )
    explaining.add_argument(
        "--boxes",
        type=_share,
        nargs="?",
        const=0.5,
        metavar="SHARE",
        help="add to the JSON each map's box and mask: its largest part above a share "
        "of its maximum (0.5 if none is given)",
    )
    explaining.add_argument("--out", default="explained", metavar="DIR")

    listing = commands.add_parser("models", help="list models, or a model's layers")
    listing.set_defaults(command=_list_models)
    listing.add_argument("--layers", metavar="NAME", help="a model's layers and shapes")

    exporting = commands.add_parser(
        "export", help="write an attribution function that runs without this package"
    )
    exporting.set_defaults(command=_export)
    _add_model_options(exporting)
    exporting.add_argument("--method", default="ib", metavar="NAME")
    exporting.add_argument(
        "--format",
        dest="file_format",
        choices=export.FORMATS,
        default="jax",
        help="jax runs where jax is, onnx where onnxruntime is; some methods have no "
        "ONNX form (default: %(default)s)",
    )
    exporting.add_argument(
        "--out",
        metavar="FILE",
        help="default: attribution.jaxexport, or attribution.onnx",
    )
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="efficientnet_lite0",
        metavar="NAME",
        help="see `ibsgl models` (default: %(default)s)",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--weights",
        metavar="FILE",
        help=".safetensors, .npz or .pth (default: those of an installed package)",
    )
    source.add_argument(
        "--checkpoint", metavar="RUN", help="folder written by `python -m train`"
    )
    parser.add_argument(
        "--layer", metavar="NAME", help="see `ibsgl models --layers MODEL`"
    )
    parser.add_argument(
        "--stats",
        metavar="FOLDER",
        help="typical photos, some hundreds, from which the bottleneck's noise is "
        "learned; remembered for the next time",
    )
    parser.add_argument(
        "--seed", type=_whole_number(0, MAX_SEED), default=0, metavar="N"
    )
    parser.add_argument(
        "--chunk-size",
        type=_whole_number(1, MAX_CHUNK),
        default=8,
        metavar="N",
        help="photos worked on at once (default: %(default)s)",
    )


def _whole_number(low: int, high: int):
    def parse(text: str) -> int:
        digits = text.removeprefix("-")
        is_number = digits.isascii() and digits.isdigit() and len(digits) < 40
        if not is_number or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(
                f"{text!r} must be a whole number, {low} to {high}"
            )
        return int(text)

    return parse


def _share(text: str) -> float:
    value = float(text) if text.replace(".", "", 1).isdigit() else -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share from 0 to below 1")
    return value


def _explain(*, photos, method, **options) -> int:
    methods = classifier.parse_methods(method)
    return explain.explain(photos, methods=methods, **options)


def _export(*, method, **options) -> int:
    methods = classifier.parse_methods(method)
    if len(methods) != 1:
        raise UserError("--method: one file holds one method")
    return export.export_function(method=methods[0], **options)


def _list_models(*, layers: str | None) -> int:
    if layers is None:
        for name in models.MODELS:
            print(name)
        return 0
    try:
        model = models.create(layers, num_classes=1000)
    except ValueError as error:
        raise UserError(str(error)) from None
    try:
        size = pretrained.preprocessing(layers).size
    except ValueError:  # a model without pretrained weights: any size will do
        size = 48
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    shapes = tapping.layer_names(model, variables, (size, size, 3))
    width = max(map(len, shapes))
    for layer, shape in shapes.items():
        print(f"{layer:{width}}  {' x '.join(map(str, shape))}")
    return 0
