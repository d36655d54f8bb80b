"""Kept for the old command `python -m utils.compare`; the same as `python -m mdil compare`."""
import runpy
import sys

if __name__ == '__main__':
    sys.argv.insert(1, 'compare')
    runpy.run_module('mdil', run_name='__main__')
