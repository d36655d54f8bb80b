"""Kept for the old command `python -m utils.export`; the same as `python -m mdil export`."""
import runpy
import sys

if __name__ == '__main__':
    sys.argv.insert(1, 'export')
    runpy.run_module('mdil', run_name='__main__')
