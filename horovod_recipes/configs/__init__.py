"""The packaged configs: `--config=NAME` loads NAME.py from this folder."""
