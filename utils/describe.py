"""Kept for the old command `python -m utils.describe`; the same as `python -m mdil describe`."""
import runpy
import sys

if __name__ == '__main__':
    sys.argv.insert(1, 'describe')
    runpy.run_module('mdil', run_name='__main__')
