"""What an earlier evaluation wrote: `eval.py --resume` keeps its results, and nothing is replaced unasked."""
import json
import os
from pathlib import Path

from mdil.datasets.judgement import content_digest
from mdil.evaluation import tables
from mdil.training.run import WRITTEN
from mdil.utils.errors import UserError
from mdil.utils.files import check_new, check_results, check_writable, read_object, same_file, written_through
from mdil.utils.parser import flag

# Options of eval.py that name what it writes: files, and folders of pictures.
FILES = 'json', 'csv', 'markdown', 'latex', 'save_panels'
FOLDERS = {'overlays': 'save_overlays', 'color': 'save_color', 'extremes': 'save_extremes',
           'confusion': 'save_confusion'}
# Options that results do not depend on, and the checkpoints, which are compared by content.
OTHERS = {'state', 'device', 'num_workers', 'cuda_graphs', 'resume', 'overwrite', 'per_class', 'images', *FILES,
          *FOLDERS.values()}


def check_files(options):
    """UserError if a file or folder to write cannot be written, or would replace what --overwrite does not give up."""
    inputs = *options.state, *options.single_task
    known = resumed(options, inputs) if options.resume and options.json and not options.overwrite else {}
    for name in (*FILES, *FOLDERS.values()):
        path = getattr(options, name)
        if path and Path(path).name in WRITTEN:
            raise UserError(f'{flag(name)} {path} is the name of a file that runs write; choose another name')
        if path and name in FILES:
            check_new(flag(name), path, options.overwrite or bool(known) and belongs(name, path, known), inputs)
        elif path:
            check_folder(flag(name), Path(path), options.overwrite, inputs)


def check_folder(option, folder, overwrite, inputs):
    """UserError if a folder for pictures cannot be written to, or holds some, unless `overwrite`."""
    check_writable(option, folder, folder=True, inputs=inputs)
    if not overwrite and (any(folder.glob('*/*.png')) or any(folder.glob('*/*/*.png'))):
        raise UserError(f'{option} {folder} holds pictures; name another folder, or replace them with --overwrite')


def resumed(options, inputs):
    """The object in --json, {} if there is none; UserError if it is not the result of checkpoints like --state."""
    check_results('--json', options.json, ('domains', 'steps'), inputs)
    known = {} if written_through(options.json) else read_object(options.json)
    steps = known.get('steps') if isinstance(known.get('steps'), list) else []
    for step, state in zip(steps, options.state):
        if isinstance(step, dict) and not is_result_of(step, state):
            raise UserError(f'--json {options.json} holds the results of {step.get("state")}, not of {state}; name '
                            'another file, move this one away, or replace it with --overwrite')
    return known


def is_result_of(step, state):
    """Whether a step in results is of the checkpoint `state`: of its name, or of its content if it was moved."""
    named = str(step.get('state'))
    return named == state or same_file(named, state) or os.path.isfile(state) and digest(state) == step.get('digest')


def belongs(name, path, known):
    """Whether the file at `path`, option `name`, holds just what is in the results `known`, or is these."""
    try:
        content = Path(path).read_text()
        return name == 'json' or content in [tables.documents(known, per_class)[name] for per_class in (False, True)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def settings(options):
    """{name: value} of the options that results depend on. Call it before `run` sets a missing size.

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
