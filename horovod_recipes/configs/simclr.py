"""Trains an encoder without labels, by SimCLR, with LARS.

    horovodrun -np 128 -H ... python -m horovod_recipes.train
        --config=simclr:imagenet_4096 --workdir=DIR

Source: Chen et al., "A Simple Framework for Contrastive Learning of Visual
Representations", arXiv 2002.05709, and https://github.com/google-research/simclr
for CIFAR-10. On ImageNet the rate is 0.3 per 256 images, and the weight decay
is 1e-6 (section 2.2). ResNet-50 normalizes images here, which the source does
not. Convolutions start with He's initial weights, and stage 1 of ResNet-18 has
no projection.

| variant | network | global batch | epochs | rate | expected top-1, % |
|---|---|---|---|---|---|
| imagenet_4096 | ResNet-50 | 4,096 | 100 | 4.8 | 64.6 (appendix B.1) |
| imagenet_8192 | ResNet-50 | 8,192 | 100 | 9.6 | 64.8 (appendix B.1) |
| cifar10 | ResNet-18 | 512 | 1,000 | 2.0 | 91 (repository) |
| fashion_mnist | 4 blocks of it | 1,024 | 20 | 32.0 | |
| digits | 3 blocks of it | 256 | 20 | 3.0 | |

The expected top-1 is that of a linear classifier (`horovod_recipes.evaluate`).
The first three have not run at full size here. The last two are for two CPU
cores. Their images are grey, so that of their colours only brightness and
contrast change. Nothing is blurred.
"""

from ml_collections import config_dict

from horovod_recipes.configs import _defaults
from horovod_recipes.configs import _imagenet
from horovod_recipes.configs.resnet50 import resnet50

VARIANTS = (
    "imagenet_4096",
    "imagenet_8192",
    "cifar10",
    "fashion_mnist",
    "digits",
)


def get_config(variant="imagenet_4096"):
    """Returns the `ConfigDict` of a variant."""
    rows = {name: globals()[name] for name in VARIANTS}
    config = _imagenet.row(rows, variant)()
    config.task = "simclr"
    return config


def imagenet_4096():
    config = _imagenet.get_config()
    config.model = resnet50("v1.5")
    config.model.batch_norm = "synchronized"
    config.model.zero_gamma = True
    config.dataset.augmentation = "simclr"
    config.global_batch_size = 4096
    # Each image has two views.
    config.max_micro_batch_size = 32
    config.simclr = simclr(temperature=0.1, projection_layers=2)
    config.optimizer = lars(weight_decay=1e-6)
    config.schedule = schedule(peak_learning_rate=4.8, warmup_epochs=10)
    config.expected_top1 = 64.6
    return config


def imagenet_8192():
    config = imagenet_4096()
    config.global_batch_size = 8192
    config.schedule.peak_learning_rate = 9.6
    config.expected_top1 = 64.8
    return config


def cifar10():
    config = _defaults.get_config()
    config.model = config_dict.create(
        name="resnet18", batch_norm="synchronized", zero_gamma=True
    )
    config.dataset.update(
        name="cifar10",
        num_classes=10,
        train_examples=50_000,
        test_examples=10_000,
        augmentation="simclr_small",
    )
    config.global_batch_size = 512
    config.max_micro_batch_size = 256
    config.epochs = 1000
    config.simclr = simclr(temperature=0.5, projection_layers=3)
    config.optimizer = lars(weight_decay=1e-4)
    config.schedule = schedule(peak_learning_rate=2.0, warmup_epochs=10)
    config.evaluate_every_epochs = 10
    config.checkpoint_every_epochs = 10
    config.expected_top1 = 91.0
    return config


def fashion_mnist():
    config = cifar10()
    config.model.update(
        stage_blocks=(1, 1, 1, 1),
        width=16,
        stem_stride=2,
        # On CPUs, synchronizing makes a step slower.
        batch_norm="micro_batch",
        # Blocks that start as their shortcut learn more slowly.
        zero_gamma=False,
    )
    config.dataset.update(
        name="fashion_mnist",
        train_examples=60_000,
        augmentation="simclr_grey",
        cache=True,
    )
    config.global_batch_size = 1024
    config.max_micro_batch_size = 512
    config.epochs = 20
    config.simclr.temperature = 0.2
    config.schedule.update(peak_learning_rate=32.0, warmup_epochs=2)
    # At the full rate, the probe of so short a training diverges.
    config.optimizer.unadapted_scale = 0.1
    config.evaluate_every_epochs = 5
    config.checkpoint_every_epochs = 5
    config.expected_top1 = None
    return config


def digits():
    config = fashion_mnist()
    config.model.stage_blocks = (1, 1, 1)
    config.dataset.update(
        name="mnist5k",
        train_examples=4000,
        test_examples=1000,
        augmentation="simclr_digits",
        cache=False,
    )
    config.global_batch_size = 256
    config.schedule.peak_learning_rate = 3.0
    config.evaluate_every_epochs = 10
    config.checkpoint_every_epochs = 10
    config.log_trust_ratios_every_steps = 15
    return config


def simclr(temperature, projection_layers):
    """Returns `config.simclr`: the loss, and the head with 128 outputs."""
    return config_dict.create(
        temperature=temperature,
        projection_layers=projection_layers,
        embedding_size=128,
    )


def lars(weight_decay):
    """Returns `config.optimizer` for LARS as SimCLR sets it.

    Biases, batch norm and the linear probe are neither adapted nor decayed.
    With task=classification, the layer of the logits takes the probe's place.
    """
    excluded = ["/(bias|gamma|beta)$", "^(probe|logits)/"]
    return config_dict.create(
        momentum=0.9,
        weight_decay=weight_decay,
        trust_coefficient=0.001,
        trust_ratio_norm="joint",
        exclude_from_layer_adaptation=excluded,
        exclude_from_weight_decay=excluded,
    )


def schedule(peak_learning_rate, warmup_epochs):
    """Returns `config.schedule`: a linear warm-up, then half a cosine."""
    return config_dict.create(
        peak_learning_rate=peak_learning_rate,
        warmup_epochs=warmup_epochs,
        decay="cosine",
        power=2.0,
    )
