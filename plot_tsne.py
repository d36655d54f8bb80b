"""Kept for the old command `python plot_tsne.py`; the same as `python -m mdil tsne`."""
from mdil.evaluation.tsne import main
from mdil.utils.errors import run_main

if __name__ == '__main__':
    run_main(main)
