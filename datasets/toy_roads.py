"""Kept for the old command `python -m datasets.toy_roads`; the same as `python -m mdil toy-roads`."""
from mdil.datasets.toy.roads import main
from mdil.utils.errors import run_main

if __name__ == '__main__':
    run_main(main)
