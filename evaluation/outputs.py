"""The folder and files that predict.py writes to: what goes where, and what must not be replaced or mixed."""
import contextlib
import fcntl
import hashlib
import json
import os
import re
from pathlib import Path
from urllib.parse import quote

from mdil.models.fingerprint import SHOWN
from mdil.utils.errors import UserError
from mdil.utils.files import check_writable, read_object, same_file, temporary_name, write_json, written_through

# What --save can write for an image, and the suffix of its file.
ENDINGS = {'labels': '.png', 'color': '.color.png', 'overlay': '.overlay.png', 'confidence': '.confidence.png'}
MADE_BY = 'predict.json'        # in --out: the network and settings of the predictions there, and their inputs
# The file names of a video's predictions, in a folder of its own.
FRAME = re.compile(r'\d{6,}(' + '|'.join(map(re.escape, ENDINGS.values())) + ')')
LONGEST = 100                   # letters of a domain's name in the file name of its legend


def targets(options, name):
    """{kind: path} of the files to save for the image called `name`."""
    return {kind: Path(options.out) / f'{name}{ENDINGS[kind]}' for kind in options.save}


def real_paths(sources):
    """The paths of the inputs, links followed."""
    return {os.path.realpath(source.path) for source in sources}


def check_targets(options, sources):
    """UserError if two images would be written to the same file, or one would replace an input."""
    for folder in options.input:
        if same_file(folder, options.out):
            raise UserError(f'--out {options.out} is the folder {folder} of --input, so predictions would lie among '
                            'the images; name another folder, or one below it')
    inputs, owners = real_paths(sources), {}
    record = os.path.realpath(options.json) if options.json else None
    if options.json:
        check_writable('--json', options.json, inputs=[*options.input, *inputs])
    if record == os.path.realpath(Path(options.out) / MADE_BY):
        raise UserError(f'--json {options.json} is where predict.py records its settings; name another file')
    for source in sources:
        for path in targets(options, source.name).values():
            place = os.path.realpath(path)
            if place == record:
                raise UserError(f'--json {options.json} is an output file of {source.path}; name another file')
            if place in inputs:
                raise UserError(f'{path} is an input and would be replaced; choose another --out')
            if owners.get(path) == source.path:
                raise UserError(f'{source.path} is given twice')
            if path in owners:
                raise UserError(f'{owners[path]} and {source.path} would both be written to {path}; '
                                'predict them in two runs, each with its own --out')
            owners[path] = source.path
    check_frames(options, sources)
    check_folders(options, sources)


def check_frames(options, sources):
    """UserError if an image, or its prediction, has the place of a prediction of a video's frame."""
    videos = {os.path.realpath(Path(options.out) / source.name): source.path for source in sources if source.is_video}
    for source in (source for source in sources if not source.is_video):
        for path in (source.path, *targets(options, source.name).values()):
            video = videos.get(os.path.dirname(os.path.realpath(path)))
            if video and FRAME.fullmatch(path.name):
                raise UserError(f'{source.path} would share {path} with a frame of {video}; predict the video in a run '
                                'of its own, with another --out')


def check_folders(options, sources):
    """UserError if a folder for predictions, or the one in which it would be made, cannot be written to."""
    places = ((source, Path(options.out) / source.name) for source in sources)
    for folder in {place if source.is_video else place.parent for source, place in places}:
        there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
        if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f'{there} is no folder that predictions can be written to; choose another --out')


def too_long(path):
    """Whether a path, or the name of its temporary file, is longer than its file system allows."""
    there = next(place for place in path.parents if os.path.isdir(place))
    temporary = os.fsencode(os.path.abspath(temporary_name(path)))
    longest = max(map(len, temporary.split(b'/')))
    return 0 < os.pathconf(there, 'PC_NAME_MAX') < longest or 0 < os.pathconf(there, 'PC_PATH_MAX') <= len(temporary)


def branch_of(options, predictor):
    """Name of the domain whose branch segments all images, or 'auto'."""
    if predictor.identifier:
        return 'auto'
    return predictor.domains[0 if options.domain in (None, 'auto') else predictor.index(options.domain)].name


def settings(options, predictor):
    """Everything that the predictions depend on, as recorded in MADE_BY."""
    files = [Path(options.state)]
    if files[0].suffix.lower() == '.xml':       # OpenVINO keeps the weights in a second file
        files.append(files[0].with_suffix('.bin'))
    digest = hashlib.sha256(b''.join(map(Path.read_bytes, files))).hexdigest()
    return {'network': digest[:SHOWN], 'domains': ' '.join(domain.name for domain in predictor.domains),
            'domain': branch_of(options, predictor), 'sequence': options.sequence,
            'size': 'x'.join(map(str, predictor.size[::-1])) if predictor.size else 'native',
            'label-ids': options.label_ids, 'precision': options.precision}


def read_records(options, made_by):
    """The entries in the --json file, or {} if there is none; UserError unless all say that `made_by` made them."""
    if not options.json or not Path(options.json).exists() or written_through(options.json):
        return {}
    try:
        records = json.loads(Path(options.json).read_text())
    except (OSError, ValueError):
        records = None
    if not isinstance(records, dict) or not all(isinstance(entry, dict) and 'classes' in entry
                                                for entry in records.values()):
        raise UserError(f'--json {options.json} exists and was not written by predict.py; choose another name, or '
                        'replace it with --overwrite')
    odd = next((image for image, entry in records.items() if entry.get('made_by') != made_by), None)
    if odd:
        raise UserError(f'--json {options.json} holds {odd}, which was predicted with other settings; choose another '
                        'name, or replace it with --overwrite')
    return records


def reset_records(options):
    """Empties the --json file if --overwrite is given: from then on, entries are only added."""
    if options.json and options.overwrite and not written_through(options.json):
        write_json(options.json, {})


def add_records(options, made_by, records):
    """Adds entries to the --json file, which another run may have changed since this one read it."""
    if options.json:
        with alone_in(os.path.dirname(os.path.realpath(options.json))):
            write_json(options.json, {**read_records(options, made_by), **records})


@contextlib.contextmanager
def alone_in(folder):
    """Within the context, no other run changes the records in a folder, if its file system can lock folders."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            number = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, number)
            fcntl.flock(number, fcntl.LOCK_EX)
        yield


def predictions_of(options, source):
    """Existing files, of all kinds, at the places of a Source's predictions."""
    if source.is_video:
        return [path for path in (Path(options.out) / source.name).glob('*.png') if FRAME.fullmatch(path.name)]
    places = [Path(options.out) / f'{source.name}{ending}' for ending in ENDINGS.values()]
    return [path for path in places if os.path.exists(path)]


def legends(options, predictor):
    """{path in --out: Domain} of the legends of the colours of all branches."""
    return {Path(options.out) / f'legend-of-{quote(domain.name, safe="")[:LONGEST]}.png': domain
            for domain in predictor.domains}


def wanted_legends(options, predictor, sources):
    """Those of `legends` to write: of the branches that may be used, if colours are saved.

    A file that is there is kept, unless --overwrite. UserError if one has the name of an input or of another output.
    """
    if not {'color', 'overlay'} & set(options.save):
        return {}
    branch, taken = branch_of(options, predictor), real_paths(sources)
    taken |= {os.path.realpath(path) for source in sources for path in targets(options, source.name).values()}
    taken |= {os.path.realpath(path) for path in (options.state, options.json) if path}
    found = {path: domain for path, domain in legends(options, predictor).items() if branch in ('auto', domain.name)}
    for path in found:
        if os.path.realpath(path) in taken:
            raise UserError(f'{path} is where the legend of the colours goes, but also an input or another output; '
                            'rename that, or choose another --out')
    return {path: domain for path, domain in found.items() if options.overwrite or not os.path.lexists(path)}


def input_of(source):
    """The absolute path of a Source. Links to its folder are followed; the file keeps its name, which outputs bear."""
    return os.path.join(os.path.realpath(source.path.parent), source.path.name)


def output_of(source):
    """What a Source's outputs are called below --out, without their endings; 'name/' for a video."""
    return f'{source.name}/' if source.is_video else source.name


def known_inputs(before):
    """The {output: input} that earlier runs recorded, from the content of MADE_BY; {} if it does not have that form."""
    found = before.get('inputs')
    return found if isinstance(found, dict) and all(isinstance(place, str) for place in found.values()) else {}


def check_inputs(options, sources, recorded):
    """Those Sources whose outputs are `recorded`, {output: input}, for another input; UserError unless --overwrite."""
    taken = [source for source in sources if recorded.get(output_of(source)) not in (None, input_of(source))
             and predictions_of(options, source)]
    if taken and not options.overwrite:
        output = output_of(taken[0])
        raise UserError(f'--out {options.out}: {output} is there the prediction of {recorded[output]}, not of '
                        f'{taken[0].path}; choose another --out, or replace it with --overwrite')
    return taken


def claim(options, predictor, sources, made):
    """Records in --out the settings of the predictions, `made`, and which input each output is for.

    UserError if --out holds predictions made with other or unknown settings, or those of `sources` are for other
    inputs. --overwrite removes these instead; then UserError if any made with other settings would remain. Folders of
    earlier versions do not say what an output is for; any input may have it.
    """
    path, inputs = Path(options.out) / MADE_BY, real_paths(sources)
    with alone_in(options.out):
        before = read_object(path)
        old = {found for source in sources for found in predictions_of(options, source)
               if os.path.realpath(found) not in inputs}
        changed = check_settings(options, predictor, before, made, old, inputs)
        recorded = {} if changed else known_inputs(before)
        taken = check_inputs(options, sources, recorded)
        replaced = {found for source in taken for found in predictions_of(options, source)}
        # A run resumed after an interruption would keep these.
        for found in old if changed or not before else old & replaced:
            found.unlink()
        recorded |= {output_of(source): input_of(source) for source in sources}
        write_json(path, {'state': str(options.state), **made, 'inputs': dict(sorted(recorded.items()))})


def check_settings(options, predictor, before, made, old, inputs):
    """What differs between the settings `before` and `made`; UserError as in `claim`; old: existing predictions."""
    changed = [f'{name} {before[name]}, now {value}' for name, value in made.items()
               if before.get(name, value) != value]
    if options.overwrite:
        if changed:
            check_alone_in_out(options, {*old, *legends(options, predictor)}, inputs)
    elif changed:
        raise UserError(f'--out {options.out} holds predictions made with other settings: {"; ".join(changed)}; choose '
                        'another --out, or replace them with --overwrite')
    elif not before and (os.path.exists(Path(options.out) / MADE_BY) or old):
        raise UserError(f'--out {options.out} holds predictions without {MADE_BY}, which records their settings; '
                        'choose another --out, or replace them with --overwrite')
    return changed


def check_alone_in_out(options, replaced, inputs):
    """UserError if --out holds pictures besides those that are `replaced` and the inputs."""
    others = {path for path in Path(options.out).rglob('*.png') if os.path.realpath(path) not in inputs} - replaced
    if others:
        raise UserError(f'--out {options.out} holds {min(others).name}, which was made with other settings and would '
                        'remain; choose another --out')
