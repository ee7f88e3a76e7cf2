"""Optimizers of other projects that need a special import."""

import importlib
import importlib.util
import pathlib
import sys
import types


def timm_lars():
    """Returns timm's Lars, or None if timm or torch is not installed.

    timm as a whole needs torchvision. So empty modules replace its packages
    while its module of Lars is imported.
    """
    timm = importlib.util.find_spec("timm")
    if timm is None or importlib.util.find_spec("torch") is None:
        return None
    folder = pathlib.Path(timm.origin).parent
    for name, path in {"timm": folder, "timm.optim": folder / "optim"}.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(path)]
    try:
        return importlib.import_module("timm.optim.lars").Lars
    finally:
        del sys.modules["timm"], sys.modules["timm.optim"]
