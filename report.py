"""Kept for the old command `python report.py`; the same as `python -m mdil report`."""
from mdil.evaluation.report import main
from mdil.utils.errors import run_main

if __name__ == '__main__':
    run_main(main)
