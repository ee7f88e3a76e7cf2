"""The packaged configs: `--config=NAME` is the file NAME.py of this folder."""
