"""Data-parallel training of Keras 3 models with LARS under horovodrun."""
