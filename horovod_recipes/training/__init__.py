"""What a training job is made of; `train_and_evaluate` runs one.

Import from the modules: `from horovod_recipes.training.job import ...`.
"""
