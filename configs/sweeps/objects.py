"""Which map should teach a pretrained network on real objects: three seeds.

    python -m train.sweep configs/sweeps/objects.py --num-perturbed 0
    python -m train.sweep configs/sweeps/objects.py --split seen --num-perturbed 0

The second command measures the same networks on objects that they learned from, in
scenes that they did not. All teachers are at the layer of twice the last one's
resolution, in every fourth step, with one mu. "hirescam_squared" is the default;
"oracle" is the object's true mask, "strong" a teacher in every step of the phase with
five times the mu, and "active" that with a step on the elements above zero alone
(`python -m benchmarks.reach`). Rivals: Saliency Guided Training, ICASC, and the energy
loss, which sees the masks.
"""

from configs import default, objects
from configs.baselines import energy
from configs.sweeps import variants

SEEDS = (0, 1, 2)
CONTROL = "control"
STRONG = dict(mu=100.0, every=1, release=0.0)
ACTIVE = STRONG | dict(guidance__move="active")


def get_config():
    config = objects.get_config()
    variants.quiet(config)
    config.control.num_epochs, config.control.learning_rate = 1.0, 2.5e-4
    config.guided = default.guided_phase(**default.length_of(config.control))
    config.phases = ("head", "plain", "control")
    variants.add(config, "hirescam_squared")
    variants.add(config, "bottleneck_20", **default.BOTTLENECK)
    variants.add(config, "oracle", teacher="mask", teacher_power=1.0)
    for name in ("oracle", "hirescam_squared", "bottleneck_20"):
        variants.add(config, f"{name}_active", base=name, **ACTIVE)
    variants.add_rivals(config)
    variants.put(config, "energy", energy.phase(**default.length_of(config.control)))
    variants.add(config, "oracle_strong", base="oracle", **STRONG)
    return config
