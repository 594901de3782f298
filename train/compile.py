"""python -m train.compile --config=... --topology=v5e:16x16: a TPU pod without a TPU.

Compiles the real step of a configuration ahead of time with libtpu and prints, beside
the plain step's, memory and work per chip and what the chips tell each other; of a
phase that guides only some of its steps, the figures of a guided one. Needs
`pip install -e ".[train,tpu]"`, no TPU.
"""

from ibsgl_jax.app.interrupt import exit_on_interrupt

if __name__ == "__main__":  # what follows takes seconds
    exit_on_interrupt()

import json
import os

import jax
from absl import app, flags

from configs import default
from train import command
from train.errors import CompileError
from train.method.check import check_config
from train.show.markdown import markdown
from train.tpu import ahead

MAX_CLASSES = 10**6
DEFAULT_CONFIG = "configs/imagenet_resnet50.py"


def report(config, topology: str, name: str, rows: dict, num_chips: int) -> str:
    """The table, the plain step's column beside the phase's."""
    lines = [
        f"{config.model}, {config.image_size} pixels, {config.dtype}, "
        f"{config.batch_size} images on {topology} ({num_chips} chips, "
        f"{config.batch_size // num_chips} a chip)",
        "",
    ]
    cells = []
    for key, title, unit, scale in (
        ("memory", "memory", "GiB", 2**30),
        ("memory_temporary", "of which temporary", "GiB", 2**30),
        ("flops", "operations", "GFLOP", 1e9),
        ("bytes_accessed", "main memory traffic", "GiB", 2**30),
        ("bytes_unguided", "where a step is not guided", "GiB", 2**30),
        ("collectives", "collectives", "", 1),
        ("collective_bytes", "their volume", "MiB", 2**20),
    ):
        plain, other = (row[key] / scale for row in rows.values())
        ratio = f"{other / plain:.3f}" if plain else "-"
        form = ".0f" if key == "collectives" else ".3f"
        cells.append((f"{title} {unit}", f"{plain:{form}}", f"{other:{form}}", ratio))
    kind = topology.split(":")[0]
    if kind in ahead.PEAKS:
        both = [ahead.bounds(row, kind) for row in rows.values()]
        for limit in both[0]:
            plain, other = (each[limit] for each in both)
            title = f"at least, by {limit}, ms"
            figures = (f"{plain:.2f}", f"{other:.2f}", f"{other / plain:.3f}")
            cells.append((title, *figures))
    header = ("one step, per chip", "plain", name, "ratio")
    lines.append(markdown(header, cells))
    gib = ahead.CHIP_GIB.get(kind)
    if gib:
        most = max(row["memory"] for row in rows.values())
        lines.append(f"\nfits: {most / 2**30:.2f} of {gib} GiB a chip")
    return "\n".join(lines)


def run(config, topology, phase_name=None, num_classes=1000) -> tuple[dict, str]:
    """Compile plain and guided; the measures and the table.

    Raises:
      CompileError: see ``compile_step`` and ``describe``.
    """
    name = ahead.choose_phase(config, phase_name)
    devices = ahead.describe(topology)
    check_config(config)
    rows = {}
    for title, phase in (("plain", default.plain_phase()), (name, config[name])):
        key = title if title not in rows else f"{title} (again)"
        rows[key] = ahead.measure(
            ahead.compile_step(config, phase, devices, num_classes)
        )
        rows[key]["flops"] += ahead.repeated_flops(
            config, phase, devices, config.batch_size // len(devices), num_classes
        )
    gib = ahead.CHIP_GIB.get(topology.split(":")[0])
    most = max(row["memory"] for row in rows.values())
    if gib and most > gib * 2**30:
        raise CompileError(
            f"a batch of {config.batch_size} does not fit: "
            f"{config.batch_size // len(devices)} images on a chip need "
            f"{most / 2**30:.2f} of {gib} GiB; lower --config.batch_size or raise "
            "--config.accumulate_steps"
        )
    return rows, report(config, topology, name, rows, len(devices))


def define_flags():
    """Not at import: other commands have flags of these names."""
    command.define_config(DEFAULT_CONFIG)
    flags.DEFINE_string(
        "topology", "v5e:4x4", "Slice to compile for: v4:2x2x4, v5e:16x16, v5p:4x4x8."
    )
    flags.DEFINE_string(
        "phase", None, "Phase whose step to compile; the last guided one if absent."
    )
    flags.DEFINE_integer(
        "num_classes", 1000, "Of the data set, which need not be there."
    )
    flags.DEFINE_bool("json", False, "Print one JSON object instead of a table.")


@command.run
def main(argv):
    given = flags.FLAGS
    if len(argv) > 1:
        raise CompileError(f"unexpected argument {argv[1]!r}; see --help")
    if not 1 <= given.num_classes <= MAX_CLASSES:
        raise CompileError(
            f"--num_classes={given.num_classes}: give a number from 1 to {MAX_CLASSES}"
        )
    # No TPU is looked for; the compiler is asked for by name.
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")
    rows, text = run(
        given.config, given.topology, given.phase, num_classes=given.num_classes
    )
    print(json.dumps(rows) if given.json else text)
    return 0


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=command.make_parser(DEFAULT_CONFIG))
