"""Trains AlexNet-BN on ImageNet with LARS and batches of 512 to 32K.

    horovodrun -np 8 python -m horovod_recipes.train --config=alexnet_bn:16k
        --workdir=DIR

Source: You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks
with Layer-wise Adaptive Rate Scaling", the conference-review version of arXiv
1708.03888, the tables of AlexNet-BN. That network is AlexNet with batch norm.
Plain variants use LARS. `_sgd_best` uses SGD with the best rate that the paper
found. `_sgd` is the paper's baseline: SGD, with the rate of batch 512 scaled
linearly, and the warm-up of `_sgd_best`.

Hardware: any GPU with 8 GB. A micro-batch has up to 128 images; each rank
accumulates as many as its share of the batch needs. Batch norm computes its
statistics over a micro-batch; the paper does not state its own size. This
recipe has not run at full size here: the top-1 values come from the source.

| variant | rate | warm-up epochs | expected top-1, % |
|---|---|---|---|
| 512 | 2 | 5 | 60.2 |
| 4k | 10 | 5 | 60.4 |
| 8k | 14 | 5 | 60.1 |
| 16k | 23 | 5 | 59.3 |
| 32k | 22 | 5 | 57.8 |
| 512_sgd | 0.02 | 2.5 | 60.2 |
| 4k_sgd | 0.16 | 2.5 | |
| 8k_sgd | 0.32 | 2.5 | |
| 16k_sgd | 0.64 | 2.5 | |
| 32k_sgd | 1.28 | 2.5 | |
| 4k_sgd_best | 0.18 | 2.5 | 58.9 |
| 8k_sgd_best | 0.3 | 2.5 | 58.0 |
"""

from ml_collections import config_dict

from horovod_recipes.configs import _imagenet

# Global batch, rate, warm-up epochs, expected top-1.
ROWS = {
    "512": (512, 2.0, 5, 60.2),
    "4k": (4096, 10.0, 5, 60.4),
    "8k": (8192, 14.0, 5, 60.1),
    "16k": (16384, 23.0, 5, 59.3),
    "32k": (32768, 22.0, 5, 57.8),
    "512_sgd": (512, 0.02, 2.5, 60.2),
    "4k_sgd": (4096, 0.16, 2.5, None),
    "8k_sgd": (8192, 0.32, 2.5, None),
    "16k_sgd": (16384, 0.64, 2.5, None),
    "32k_sgd": (32768, 1.28, 2.5, None),
    "4k_sgd_best": (4096, 0.18, 2.5, 58.9),
    "8k_sgd_best": (8192, 0.3, 2.5, 58.0),
}


def get_config(variant="8k"):
    """Returns the `ConfigDict` of a variant."""
    batch, rate, warmup_epochs, top1 = _imagenet.row(ROWS, variant)
    config = _imagenet.get_config()
    config.model = config_dict.create(
        name="alexnet",
        normalization="batch_norm",
        # "synchronized" would use the micro-batches of all ranks.
        batch_norm="micro_batch",
        batch_norm_momentum=0.9,
        batch_norm_epsilon=1e-4,
    )
    config.dataset.image_size = 227
    config.global_batch_size = batch
    config.max_micro_batch_size = 128
    config.schedule.peak_learning_rate = rate
    config.schedule.warmup_epochs = warmup_epochs
    config.expected_top1 = top1
    if "sgd" in variant:
        _imagenet.without_lars(config)
    return config
