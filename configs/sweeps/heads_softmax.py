"""The rows and lengths of heads_sigmoid.py under a softmax: digits.

    python -m train.sweep configs/sweeps/heads_softmax.py --num-perturbed 0 \
        --columns accuracy nll box_share overlap cosine mass_ratio p_on_object
"""

from configs.sweeps import heads_sigmoid

SEEDS, CONTROL = heads_sigmoid.SEEDS, heads_sigmoid.CONTROL


def get_config():
    return heads_sigmoid.get_config("softmax")
