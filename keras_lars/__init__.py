"""LARS, layer-wise adaptive rate scaling, for Keras 3."""

from keras_lars import callbacks
from keras_lars import schedules
from keras_lars.lars import LARS

__all__ = ["LARS", "callbacks", "schedules"]
