"""Decoy digits: whether guidance and its rivals undo a shortcut, mean and worst class.

    python -m train.sweep configs/sweeps/shortcut_rows.py --num-perturbed 0 \
        --columns accuracy worst_class box_share

All but "sound" and "last_layer" learn from images whose grey corner tells the class;
the corner is random where they are measured. From scratch, beside "plain", and (ft_)
from the weights of "plain", beside "ft_plain". A number is the per cent of the training
images that keep their masks; the guided rows with "masks" teach the others by their own
squared HiResCAM, those with "only" not at all.
"""

from configs import default, quickstart
from configs.baselines import energy, masktune, rand_r4, rrr, saliency_guided
from configs.sweeps import variants

SEEDS = (0, 1, 2, 3, 4)
CONTROL = "plain"
METHODS = (
    "rrr",
    "rrr_10",
    "rrr_1",
    "energy",
    "energy_10",
    "guided",
    "masks_100",
    "masks_10",
    "masks_1",
    "only_10",
    "saliency_guided",
)
FINE_TUNED = (
    "ft_rrr",
    "ft_energy",
    "ft_guided",
    "ft_masks_100",
    "ft_masks_10",
    "ft_masks_1",
    "ft_saliency_guided",
)
LAST = ("rand_r4",)  # the dearest row, five times as long as RRR
CONTROLS = dict.fromkeys((*FINE_TUNED, "masktune", "last_layer"), "ft_plain")

RIVALS = dict(rrr=rrr, energy=energy, rand_r4=rand_r4, saliency_guided=saliency_guided)
# Of the rows with all masks and with none, chosen by shortcut_settings.py; those with
# fewer masks, and the fine-tuned ones, have the same.
SETTINGS = {
    "rrr": dict(weight=1.0),
    "energy": dict(weight=1.0),
    "rand_r4": dict(weight=1.0),
    "saliency_guided": dict(weight=3.0),
    "guided": dict(mu=20.0),
    "masks": dict(mu=80.0),
    "only": dict(mu=80.0),
}


def base(cue: str):
    """The data, the network and the phases that others begin with or start from."""
    config = quickstart.get_config()
    variants.quiet(config)
    config.dataset = f"shortcut_digits/{cue}"
    config.image_size = 32
    config.augment = "none"  # a shift moves the decoy out of the image
    # Two convolutions, a max pool after each, three dense layers; maps of 16 x 16. A
    # residual network with a mean over the cells finds the digits and not the decoy.
    config.model = "vgg16"
    config.model_options.stage_sizes = (1, 1)
    config.model_options.stage_widths = (8, 16)
    config.model_options.dense_features = 64
    config.model_options.dropout_rate = 0.0
    scratch = dict(num_epochs=10.0, learning_rate=2e-3)
    config.save_epochs = scratch["num_epochs"]
    config.plain = default.plain_phase(**scratch)
    config.sound = default.plain_phase(**scratch, dataset=f"{config.dataset}_balanced")
    config.ft_plain = default.plain_phase(
        init="plain", num_epochs=5.0, learning_rate=1e-3
    )
    config.phases = ("plain", "sound", "ft_plain")
    return config


def method_of(name: str) -> tuple[str, float]:
    """The method of a row and the share of the images that keep their masks."""
    method, _, percent = name.removeprefix("ft_").rpartition("_")
    if percent.isdigit():
        return method, int(percent) / 100
    return name.removeprefix("ft_"), 1.0


def make_phase(config, name: str, **settings):
    """The phase of a row of ``METHODS`` or ``FINE_TUNED``."""
    start = config.ft_plain if name.startswith("ft_") else config.plain
    fields = {f: start[f] for f in ("init", "num_epochs", "learning_rate")}
    method, share = method_of(name)
    if method in RIVALS:
        phase = RIVALS[method].phase(**fields)
    else:
        # Plain steps would go back to the shortcut, so there are none.
        phase = default.guided_phase(**fields, every=1, release=0.0)
        phase.mu_warmup_epochs = fields["num_epochs"] / 2
        phase.mask_first = method == "masks"
        if method == "only":
            phase.teacher = "mask"
    if "mask_share" in phase:
        phase.mask_share = share
    phase.update(settings)
    return phase


def add_from_plain(config, **retrained):
    """MaskTune and the layers behind the features alone, as "ft_plain" from "plain".

    Args:
      config: changed in place.
      **retrained: fields of the phase "last_layer".
    """
    same = default.length_of(config.ft_plain)
    variants.put(config, "masktune", masktune.phase(**same | dict(num_epochs=1.0)))
    # It sees data without the shortcut, as no other row but "sound" does.
    last_layer = dict(layers="head", dataset=f"{config.dataset}_balanced")
    phase = default.plain_phase(**same | last_layer | retrained)
    variants.put(config, "last_layer", phase)


def get_config(cue: str = "decoy"):
    config = base(cue)
    for name in METHODS + FINE_TUNED:
        settings = SETTINGS[method_of(name)[0]]
        variants.put(config, name, make_phase(config, name, **settings))
    add_from_plain(config)
    for name in LAST:
        settings = SETTINGS[method_of(name)[0]]
        variants.put(config, name, make_phase(config, name, **settings))
    return config
