"""Every field of a configuration, with its unit. Variants change only their lines.

A run is a list of phases. Each starts from random weights or from those of an earlier
phase, has a method of its own, and is evaluated on the test split at the end.
"""

from ml_collections import ConfigDict

# What makes the bottleneck, or the squared CAM, the teacher of a guided phase.
BOTTLENECK = dict(teacher="bottleneck", teacher_method="bottleneck", teacher_power=1.0)
SQUARED_CAM = dict(teacher="hirescam", teacher_method="hirescam", teacher_power=2.0)


def length_of(phase) -> dict:
    """The fields of a phase that make another start and last as it does."""
    return {field: phase[field] for field in ("init", "num_epochs", "learning_rate")}


def plain_phase(**changes) -> ConfigDict:
    """A phase of ordinary training."""
    phase = ConfigDict()
    phase.method = "plain"  # "plain" or "guided"
    # "pretrained"; the name of an earlier phase; "best": the earlier plain phase of the
    # lowest validation NLL, of those that do not start from "best" themselves.
    phase.init = "random"
    # "head": only what is behind the features learns, and BatchNorm stays as it is.
    phase.layers = "all"
    phase.dataset = ""  # to learn from, if not the run's; measured is the run's
    phase.num_epochs = 5.0
    phase.learning_rate = 1e-3  # peak, for batch_size; cosine down to 0
    phase.warmup_epochs = 0.0  # linear, from 0
    phase.update(changes)
    return phase


def guided_phase(**changes) -> ConfigDict:
    """A phase of saliency guided localization, with the readings that we recommend."""
    phase = plain_phase()
    phase.method = "guided"
    # Weight of KL(A || A') in a guided step. What counts is mu / every: 5 in every step
    # ends within two points of 20 in every fourth ("every_step" in RESULTS.md).
    phase.mu = 20.0
    phase.mu_warmup_epochs = 0.0  # linear, from 0
    phase.stats_decay = 0.95  # of the moving feature statistics, per step
    # "bottleneck", "hirescam", "layer_cam": that map of the network itself. "average":
    # of the moving average (set ema_decay). The name of an earlier phase: of that
    # network, frozen. "mask": the object's true mask, an oracle.
    phase.teacher = "hirescam"
    phase.mask_first = False  # an example with a mask is taught by it, others as above
    phase.mask_share = 1.0  # of the examples keep their masks
    phase.teacher_method = "hirescam"  # of "average" and of an earlier phase
    # An inner layer, whose map is finer: its name, or "2x", the last one of twice the
    # resolution if there is one. It costs a pass through what is behind it for a CAM,
    # one for every step but the last, and every sample, of a bottleneck. "": the
    # features before the head.
    phase.teacher_layer = "2x"
    phase.teacher_power = 2.0  # that map / max is raised to; above 1 sharpens it
    phase.route = "target"  # or "direct": descend the saliency loss itself, without A'
    phase.every = 4  # steps: every fourth is guided, the others are nearly plain
    phase.release = 1 / 3  # share of the steps, the last ones, that are plain
    phase.only_right = True  # guide the examples whose prediction is right; or all
    phase.guidance = ConfigDict()  # fields of ibsgl_jax.guidance.GuidanceConfig
    phase.guidance.weighting = "elementwise"
    phase.guidance.cross_entropy = "categorical"
    phase.guidance.suppression = "runner_up_excess"
    phase.guidance.suppression_weight = 1.0  # the paper's beta
    phase.guidance.contrast = 0.0  # of the wrong class's evidence, taken off
    phase.guidance.gate = "correct"
    phase.guidance.step = "relative"
    phase.guidance.step_size = 0.1  # share of ||A||
    phase.guidance.move = "all"  # elements that move; or "active", those above zero
    phase.guidance.kl_over = "all"
    phase.guidance.kl_floor = 0.1  # share of the mean activation
    phase.bottleneck = ConfigDict()  # of ibsgl_jax.bottleneck.BottleneckConfig
    phase.bottleneck.num_steps = 20
    phase.bottleneck.num_samples = 1
    phase.bottleneck.learning_rate = 1.0
    phase.bottleneck.beta = 10.0
    phase.bottleneck.blur_sigma = 0.5  # cells; IBA's 1.0 is for features of 14 x 14
    phase.update(changes)
    return phase


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0

    # Data: a folder of pictures (docs/photos.md); "": the data set below.
    config.data = ""
    config.fit = "crop"  # pictures keep their aspect; "squash": to a square as they are
    # "sigmoid", a binary cross-entropy for each class: any number of labels a picture;
    # "softmax": just one.
    config.link = "softmax"
    config.class_weights = 0.0  # power of 1 / frequency in the loss; 0: none
    # Any tfds name with image and label, prepared as array_record in data_dir.
    config.dataset = "photo_digits/independent"
    config.dataset_options = ConfigDict()  # of an embedded set only, e.g. num_train
    config.data_dir = "runs/data"
    config.train_split = "train"
    config.validation_split = "validation"
    config.test_split = "test"
    config.image_size = 48  # pixels
    config.image_mean = (0.5, 0.5, 0.5)  # of pixels in [0, 1]
    config.image_std = (0.25, 0.25, 0.25)
    config.augment = "shift"  # or "none", "crop_flip", "zoom_flip", "imagenet"
    config.eval_transform = "none"  # or "resize_center"
    config.num_threads = 1  # that prepare batches
    config.num_workers = 0  # processes instead of threads

    # Model
    config.model = "small_resnet"  # or "package.module:Class": docs/extending.md
    config.model_options = ConfigDict()
    config.tap = ""  # the layer whose output are the features; "": the model's own
    config.dtype = "float32"  # or "bfloat16", of the backbone; the rest is float32
    config.pretrained = ""  # file of weights for init="pretrained"

    # Optimisation
    config.batch_size = 64  # examples, over all devices
    config.accumulate_steps = 1  # parts that a device takes its batch in
    config.label_smoothing = 0.0
    config.mixup = 0.0  # alpha of the mixture's beta distribution; 0: none
    config.ema_decay = 0.0  # of the parameters' moving average, per step; 0: none
    config.skip_nonfinite = False  # skip and count such a step instead of stopping
    config.optimizer = ConfigDict()
    config.optimizer.name = "adam"  # or "sgd"
    config.optimizer.weight_decay = 1e-4
    config.optimizer.momentum = 0.9  # sgd only
    config.optimizer.max_grad_norm = 0.0  # 0: no clipping

    # Phases, in order; each has a section of its own.
    config.phases = ("plain", "control", "guided")
    config.plain = plain_phase()
    config.control = plain_phase(init="plain", num_epochs=2.0)
    config.guided = guided_phase(init="plain", num_epochs=2.0)

    # Evaluation and records
    config.matched_area = 0.2  # mean of map / max, for area-matched AD and AI
    config.log_every = 50  # steps
    config.save_epochs = 1.0  # epochs between validations and checkpoints
    config.tensorboard = True
    config.trackers = ()  # beside it: "wandb", "mlflow"
    config.progress = True
    config.picture_phases = ("plain", "guided")  # before and after; () for no picture
    config.picture_rows = 6
    return config
