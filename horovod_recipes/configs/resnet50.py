"""Trains ResNet-50 v1 on ImageNet with LARS and batches of 256 to 32K.

    horovodrun -np 256 -H ... python -m horovod_recipes.train
        --config=resnet50:32k --workdir=DIR

Source: You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks
with Layer-wise Adaptive Rate Scaling", the conference-review version of arXiv
1708.03888, the table of ResNet-50. Plain variants use minimal augmentation, and
`_inception` uses Inception's. `_sgd` is the baseline without LARS: SGD with
momentum, a rate of 0.1 per 256 images, 5 epochs of warm-up and weight decay
1e-4. These values come from Goyal et al., arXiv 1706.02677, sections 2 and 5.1.
The baseline has minimal augmentation, and its rate decays like the others.

Hardware: any GPU with 12 GB. A micro-batch has up to 64 images; each rank
accumulates as many as its share of the batch needs. Batch norm computes its
statistics over a micro-batch. This recipe has not run at full size here: the
top-1 values come from the source.

| variant | rate | warm-up epochs | epochs | expected top-1, % | `_inception` |
|---|---|---|---|---|---|
| 256 | 4 | 0 | 100 | 73.8 | 75.8 |
| 1k | 9 | 5 | 100 | 73.3 | 75.4 |
| 8k | 30 | 5 | 100 | 73.5 | 75.2 |
| 16k | 33 | 12 | 100 | 72.9 | 74.4 |
| 16k_inception_200epochs | 33 | 12 | 200 | | 75.5 |
| 32k | 40 | 12 | 100 | 72.5 | 72.5 |
| 256_sgd | 0.1 | 5 | 100 | | |
| 1k_sgd | 0.4 | 5 | 100 | | |
| 8k_sgd | 3.2 | 5 | 100 | | |
| 16k_sgd | 6.4 | 5 | 100 | | |
| 32k_sgd | 12.8 | 5 | 100 | | |
"""

from ml_collections import config_dict

from horovod_recipes.configs import _imagenet

# Global batch, rate, warm-up epochs, epochs, expected top-1.
ROWS = {
    "256": (256, 4.0, 0, 100, 73.8),
    "1k": (1024, 9.0, 5, 100, 73.3),
    "8k": (8192, 30.0, 5, 100, 73.5),
    "16k": (16384, 33.0, 12, 100, 72.9),
    "32k": (32768, 40.0, 12, 100, 72.5),
    "256_inception": (256, 4.0, 0, 100, 75.8),
    "1k_inception": (1024, 9.0, 5, 100, 75.4),
    "8k_inception": (8192, 30.0, 5, 100, 75.2),
    "16k_inception": (16384, 33.0, 12, 100, 74.4),
    "16k_inception_200epochs": (16384, 33.0, 12, 200, 75.5),
    "32k_inception": (32768, 40.0, 12, 100, 72.5),
    "256_sgd": (256, 0.1, 5, 100, None),
    "1k_sgd": (1024, 0.4, 5, 100, None),
    "8k_sgd": (8192, 3.2, 5, 100, None),
    "16k_sgd": (16384, 6.4, 5, 100, None),
    "32k_sgd": (32768, 12.8, 5, 100, None),
}


def get_config(variant="32k"):
    """Returns the `ConfigDict` of a variant."""
    batch, rate, warmup_epochs, epochs, top1 = _imagenet.row(ROWS, variant)
    config = _imagenet.get_config()
    config.model = resnet50("v1")
    config.global_batch_size = batch
    config.max_micro_batch_size = 64
    config.epochs = epochs
    config.schedule.peak_learning_rate = rate
    config.schedule.warmup_epochs = warmup_epochs
    config.expected_top1 = top1
    if "inception" in variant:
        config.dataset.augmentation = "inception"
    if "sgd" in variant:
        _imagenet.without_lars(config)
        config.optimizer.weight_decay = 1e-4
    return config


def resnet50(version):
    """Returns `config.model` for ResNet-50, with the values of MLPerf."""
    return config_dict.create(
        name="resnet50",
        version=version,
        # "synchronized" would use the micro-batches of all ranks.
        batch_norm="micro_batch",
        batch_norm_momentum=0.9,
        batch_norm_epsilon=1e-5,
        zero_gamma=False,
        kernel_initializer="he_normal",
        logits_stddev=0.01,
    )
