"""The results of an earlier evaluation, which `eval.py --resume` keeps."""
import json
import os
from pathlib import Path

from mdil.datasets.judgement import content_digest
from mdil.utils.files import written_through

# Options of eval.py that name what it writes: files, and folders of pictures.
FILES = 'json', 'csv', 'markdown', 'latex', 'save_panels'
FOLDERS = {'overlays': 'save_overlays', 'color': 'save_color', 'extremes': 'save_extremes',
           'confusion': 'save_confusion'}
# Options that results do not depend on, and the checkpoints, which are compared by content.
OTHERS = {'state', 'device', 'num_workers', 'cuda_graphs', 'resume', 'per_class', 'images', *FILES, *FOLDERS.values()}


def settings(options):
    """{name: value} of the options that results depend on. Call it before any of them is completed.

    Checkpoints in --single-task count by their content.
    """
    given = {name: value for name, value in vars(options).items() if name not in OTHERS}
    return {**given, 'single_task': [digest(item) if os.path.isfile(item) else item for item in options.single_task]}


def earlier_results(options):
    """The content of --json if it was made with the same settings, of the checkpoints --state first; None otherwise."""
    if written_through(options.json):
        return None
    try:
        known = json.loads(Path(options.json).read_text())
        digests = [step['digest'] for step in known['steps'][:len(options.state)]]
        alike = known['options'] == settings(options) and digests == list(map(digest, options.state))
        return known if alike else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def digest(state):
    """A digest of the content of a checkpoint."""
    return content_digest(Path(state)).hex()
