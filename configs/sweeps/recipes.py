"""Which recipe works, and which part of it: every answer on digits, for five seeds.

    python -m train.sweep configs/sweeps/recipes.py

Every phase but the first and those from scratch starts from the weights of "plain" and
sees the same batches. "guided" is the quickstart's recipe; what each of the others
changes against it stands beside it.
"""

from configs import quickstart
from configs.sweeps import variants

SEEDS = (0, 1, 2, 3, 4)
CONTROL = "control"
CONTROLS = {name: "scratch_control" for name in ("scratch", "scratch_at_once")}
# Measured on the test split too; the parts were judged on validation.
FINAL = (
    "control",
    "literal",
    "saliency_guided",
    "icasc",
    "guided",
    "oracle",
    "last",
    "scratch_control",
    "scratch",
)


def get_config():
    config = quickstart.get_config()
    variants.quiet(config)
    config.phases = ("plain", "control")

    def add(name, base="guided", **fields):
        variants.add(config, name, base, **fields)

    # The rivals: Algorithm 1 as printed with IBA's own options (configs/poster.py),
    # Saliency Guided Training, ICASC.
    variants.add_literal(config)
    variants.add_rivals(config)
    # From scratch, for as many steps as "plain" and "control" have together.
    add("scratch_control", "plain", num_epochs=10.0)

    # The recipe; the true mask for a teacher; the bottleneck at the last layer, which
    # costs next to nothing; the recipe from random weights, mu growing for half of the
    # time.
    config.phases = (*config.phases, "guided")
    add("oracle", teacher="mask")
    add("last", **variants.LAST)
    scratch = dict(
        init="random",
        num_epochs=10.0,
        learning_rate=config.plain.learning_rate,
        release=0.1,
    )
    add("scratch", mu_warmup_epochs=5.0, **scratch)

    # Suppression, with the cheap teacher: none; the runner-up's map made to turn away;
    # the printed formula, with the mask of its ancestor, with the complement of the
    # bottleneck's map.
    add("no_suppression", "last", guidance__suppression_weight=0.0)
    for kind in (
        "runner_up_cosine",
        "overlap",
        "masked_overlap",
        "background_overlap",
    ):
        add(kind, "last", guidance__suppression=kind)

    # The other parts, one at a time. The teacher: its layer and steps, its blur, a
    # frozen copy.
    add("last_iba_blur", "last", bottleneck__blur_sigma=1.0)
    add("last_ten_steps", "last", bottleneck__num_steps=10)
    add("ten_steps", bottleneck__num_steps=10)
    add("frozen_teacher", teacher="plain")
    # The losses and the step.
    add("bernoulli", guidance__cross_entropy="bernoulli")
    add("spatial_kl", guidance__kl_over="spatial")
    add("plain_step", guidance__step="plain", guidance__step_size=1.0)
    add("last_every_step", "last", every=1, mu=config.guided.mu / 4)
    add("half_mu", mu=0.5 * config.guided.mu)
    # Whom, when and how; from random weights with all of mu at once.
    add("always", guidance__gate="always")
    add("all_examples", only_right=False)
    add("no_release", release=0.0)
    add("direct", route="direct", mu=0.03 * config.guided.mu)
    add("scratch_at_once", **scratch)
    return config
