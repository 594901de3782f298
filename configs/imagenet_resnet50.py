"""ImageNet, ResNet-50: trained plainly, then fine-tuned with guidance beside a control.

    python -m train --config=configs/imagenet_resnet50.py --multihost

The plain phase is the recipe of He et al., "Bag of Tricks for Image Classification with
Convolutional Neural Networks", CVPR 2019: 1,024 images a step at a learning rate of
0.4, linear warm-up over 5 epochs, cosine, Nesterov momentum 0.9, weight decay 1e-4 on
the kernels only, label smoothing 0.1, last scale of each block zero at the start, 120
epochs. Where we differ: no jitter of colours and no PCA noise, 99 % of train, the rest
being for choosing, compute in bfloat16. Mixup (0.2 there, for 200 epochs) is one field
away.

With `--config.plain.init=pretrained --config.pretrained=resnet50.pth
--config.plain.num_epochs=...`, or phases=("control", "guided") and their init set to
"pretrained", the plain phase is shortened or left out.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.dataset = "imagenet2012"
    # The last hundredth of train is for choosing; validation has the only labels left.
    config.train_split = "train[:99%]"
    config.validation_split = "train[99%:]"
    config.test_split = "validation"
    config.image_size = 224
    config.image_mean = (0.485, 0.456, 0.406)
    config.image_std = (0.229, 0.224, 0.225)
    config.augment = "imagenet"
    config.eval_transform = "resize_center"
    config.num_threads = 0
    config.num_workers = 16

    config.model = "resnet50"
    config.dtype = "bfloat16"

    config.batch_size = 1024
    config.label_smoothing = 0.1
    config.optimizer.name = "sgd"
    config.optimizer.weight_decay = 1e-4
    config.optimizer.momentum = 0.9

    config.plain.num_epochs = 120.0
    config.plain.learning_rate = 0.4
    config.plain.warmup_epochs = 5.0
    for phase in (config.control, config.guided):
        phase.num_epochs = 10.0
        phase.learning_rate = 0.02
        phase.warmup_epochs = 1.0
    config.log_every = 100
    return config
