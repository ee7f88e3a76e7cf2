"""Packaging of keras-lars: the optimizer, and the recipes as an extra."""

import pathlib

import setuptools

setuptools.setup(
    name="keras-lars",
    version="0.1.0",
    description="LARS and large-batch training recipes for Keras 3",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=setuptools.find_packages(
        include=["keras_lars*", "horovod_recipes*"]
    ),
    package_data={"horovod_recipes": ["launch/*"]},
    install_requires=["keras>=3.10"],
    extras_require={
        # Horovod is built: python -m horovod_recipes.install_horovod
        "recipes": [
            "absl-py",
            # What Horovod needs to run, so that constraints pin it.
            "cloudpickle",
            "packaging",
            "psutil",
            "pyyaml",
            "matplotlib",
            "ml_collections",
            "mlperf-logging",
            "tensorboard",
            "tensorflow-datasets",
            # tensorflow-datasets imports it without saying so.
            "importlib_resources",
        ],
        "demo": ["mlxtend"],
        # For keras_lars.callbacks.TrustRatioLogger, beside TensorFlow.
        "telemetry": ["matplotlib", "tensorboard"],
        "bench": ["jax", "matplotlib", "optax"],
        "docs": ["mkdocs-material", "mkdocstrings[python]"],
        "test": [
            "hypothesis",
            "ipykernel",
            "jax",
            "jsonschema",
            "nbclient",
            "nbformat",
            "optax",
            "pytest",
            "pytest-xdist",
            "ruff",
        ],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
