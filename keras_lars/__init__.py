"""LARS, and the trust ratio around other optimizers, for Keras 3."""

from keras_lars import callbacks
from keras_lars import schedules
from keras_lars.lars import LARS
from keras_lars.trust_ratio import TrustRatio

__all__ = ["LARS", "TrustRatio", "callbacks", "schedules"]
