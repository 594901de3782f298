"""CIFAR-10, ResNet-18 with a 3 x 3 stem: trained plainly, then fine-tuned.

    python -m train --config=configs/cifar10_resnet18.py

The plain phase is the widely used recipe of the PyTorch example "pytorch-cifar" (Kuang
Liu): 128 images a step, momentum 0.9, weight decay 5e-4, learning rate 0.1, cosine, 200
epochs, shift by up to 4 pixels and mirror. Where we differ: Nesterov's form of the
momentum, no weight decay on norms and biases, the pixels' own standard deviations, and
95 % of train, the rest being for choosing. The features are 4 x 4 x 512. No boxes: the
table has no localisation.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.dataset = "cifar10"
    config.train_split = "train[:95%]"
    config.validation_split = "train[95%:]"
    config.test_split = "test"
    config.image_size = 32
    config.image_mean = (0.4914, 0.4822, 0.4465)
    config.image_std = (0.2470, 0.2435, 0.2616)
    config.augment = "crop_flip"

    config.model = "resnet18"
    config.model_options.stem = "cifar"

    config.batch_size = 128
    config.optimizer.name = "sgd"
    config.optimizer.weight_decay = 5e-4
    config.optimizer.momentum = 0.9

    config.plain.num_epochs = 200.0
    config.plain.learning_rate = 0.1
    for phase in (config.control, config.guided):
        phase.num_epochs = 20.0
        phase.learning_rate = 0.01
    config.log_every = 100
    return config
