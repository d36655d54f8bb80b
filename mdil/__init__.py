"""One import name for the project: `mdil.models` is models/, `mdil.train` is train.py, whatever else has those names.

The Python interface, such as `mdil.load`, is imported on first use.
"""
import importlib
from pathlib import Path

# Once installed, everything is in this folder; in a checkout it is one level up, where `python train.py` expects it.
if not Path(__file__).with_name('train.py').is_file():
    __path__.append(str(Path(__file__).resolve().parents[1]))

# Name: the module that defines it.
INTERFACE = {'load': 'mdil.api', 'step_loss': 'mdil.api', 'learn': 'mdil.learning',
             'UserError': 'mdil.utils.errors'}


def __getattr__(name):
    if name == 'published':
        return importlib.import_module('mdil.published')
    if name in INTERFACE:
        return getattr(importlib.import_module(INTERFACE[name]), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
    return sorted({*globals(), *INTERFACE})
