"""Trains Keras 3 models with LARS on many GPUs or hosts under horovodrun."""
