"""The quickstart's recipe on another task: materials instead of digits.

    python -m train --config=configs/textures.py

Patches of real materials on real photographs, 48 x 48. Nothing but the data differs
from the quickstart, whose constants were chosen on the validation splits of both tasks.
"""

from configs import quickstart


def get_config():
    config = quickstart.get_config()
    config.dataset = "photo_textures/independent"
    return config
