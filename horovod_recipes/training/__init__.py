"""The parts of a training job. `job.train_and_evaluate` runs one.

Import from the modules: `from horovod_recipes.training.job import ...`.
"""
