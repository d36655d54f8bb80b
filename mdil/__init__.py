"""The project under one name: `mdil.models` is models/ and `mdil.train` is train.py, whatever else is called so."""
from pathlib import Path

# Installed, everything lies in this folder; in a checkout one above, where `python train.py` expects it.
if not Path(__file__).with_name('train.py').is_file():
    __path__.append(str(Path(__file__).resolve().parents[1]))
