"""Proves that a step left the old domains unchanged, or says what it changed.

    python -m mdil verify runs/1/model_best.pth.tar runs/2/model_best.pth.tar
    python -m mdil verify runs/2/model_best.pth.tar
    python -m mdil verify STEP1 STEP2 --map keys.json

Every domain in both files is compared bit for bit: parameters, buffers, and the logits of fixed
probe images on the CPU. A single file is compared with the record (unchanged.json) that `train.py`
wrote next to it when the step began; its logits are not compared. Exit status: 0 unchanged,
1 changed, 2 cannot tell.

Files of other code are compared tensor by tensor with --map, a JSON file
{domain: {key prefix in OLD: key prefix in NEW}}, such as
{"cityscapes": {"backbone.": "backbone.", "head.": "heads.0."}}.
"""
import json
from pathlib import Path

import torch

from mdil.datasets.domains import canonical
from mdil.models import unchanged
from mdil.models.checkpoint import check_given, load_network, read_checkpoint, state_in
from mdil.models.fingerprint import tensor_digests
from mdil.models.methods import nameless_options
from mdil.models.safe_reading import read
from mdil.utils.errors import UserError, run_main
from mdil.utils.files import check_results, write_json
from mdil.utils.parser import Parser

PROBES, HEIGHT, WIDTH = 2, 64, 128


def parse(argv=None):
    parser = Parser(prog='python -m mdil verify',
                    description='Checks whether a step changed the old domains. Exit status: 0 unchanged, 1 changed, 2 '
                                'cannot tell.')
    parser.add_argument('state', nargs='+', metavar='OLD NEW | CKPT',
                        help='files before and after a step, or one file that is compared with its own record')
    nameless_options(parser, ' of NEW')
    parser.add_argument('--map', metavar='FILE', help='JSON: maps keys of OLD to keys of NEW, for files of other code')
    parser.add_argument('--json', metavar='FILE', help='write the result')
    options = parser.parse_args(argv)
    if len(options.state) > 2 or options.map and len(options.state) < 2:
        raise UserError(f'verify compares two files, or one with its own record; {len(options.state)} given'
                        + (' with --map' if options.map else ''))
    if options.json:
        check_results('--json', options.json, ('files', 'domains'), [*options.state, *filter(None, [options.map])])
    return options


def names_of(checkpoint, given):
    """Names of a checkpoint's domains; a file without names takes those of `given`, then 'domain N'."""
    count = len(checkpoint.layout.num_classes)
    names = checkpoint.domains or [*given, *(f'domain {number}' for number in range(len(given), count))]
    return list(map(canonical, names))[:count]


def known(path, options):
    """(Checkpoint, its network in eval mode) of a file."""
    checkpoint = read_checkpoint(path)
    model = load_network(checkpoint, options.method).eval()
    return checkpoint, model


def pairs(old, new, given):
    """[(name, index in old, index in new)] of the domains that are in both Checkpoints; UserError if there are none.

    If one file does not name its domains, they are matched to the other's by position.
    """
    nameless = old.domains is None or new.domains is None
    names = names_of(new if old.domains is None else old, given)
    if nameless:
        count = min(len(old.layout.num_classes), len(new.layout.num_classes))
        return [(name, number, number) for number, name in enumerate(names[:count])]
    others = names_of(new, given)
    found = [(name, number, others.index(name)) for number, name in enumerate(names) if name in others]
    if not found:
        raise UserError(f'{old.source} knows {", ".join(names)}, {new.source} knows {", ".join(others)}: '
                        'no domain is in both')
    return found


def probes():
    """Fixed probe images (PROBES, 3, HEIGHT, WIDTH) in [0, 1]: the first smooth, the others noise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(PROBES, 3, HEIGHT, WIDTH, generator=generator)
    smooth = torch.rand(1, 3, 4, 8, generator=generator)
    images[0] = torch.nn.functional.interpolate(smooth, (HEIGHT, WIDTH), mode='bilinear')[0]
    return images


def difference(one, other):
    """Largest difference between two networks' logits for the probe images; 0.0 if they are equal."""
    with torch.no_grad():
        a, b = one(probes()), other(probes())
    return 0.0 if torch.equal(a, b) else (a - b).abs().max().item()


def entry(moved, logits=None):
    """The entry of a domain in --json; logits: their largest difference, or None if they were not computed."""
    return {'unchanged': not moved and not logits, 'moved': str(moved), 'parameters': list(moved.parameters),
            'buffers': list(moved.buffers), 'all_parameters': moved.all_parameters, 'all_buffers': moved.all_buffers,
            'logits': logits}


def compare_networks(options):
    """{domain: entry} of two files, each of this code or published."""
    (old, one), (new, other) = (known(path, options) for path in options.state)
    networks = [checkpoint.layout.network for checkpoint in (old, new)]
    if networks[0] != networks[1]:
        raise UserError(f'{" and ".join(options.state)} hold different networks: {" and ".join(networks)}')
    check_given(options.domains, new)
    result = {}
    for name, number, index in pairs(old, new, options.domains):
        classes = old.layout.num_classes[number], new.layout.num_classes[index]
        if classes[0] != classes[1]:
            raise UserError(f'{name} has {classes[0]} classes in {old.source} and {classes[1]} in {new.source}')
        views = one.single(number), other.single(index)
        moved = unchanged.compare(*(tensor_digests(stated(view, file)) for view, file in zip(views, (old, new))),
                                  f'{name} in {new.source}')
        result[name] = entry(moved, difference(*views))
    return result


def stated(view, checkpoint):
    """{key: tensor} of a view, without batch-norm counters if the file has none, as in early files."""
    counted = any(key.endswith(unchanged.COUNTER) for key in checkpoint.layout.state)
    return {key: value for key, value in view.state_dict().items() if counted or not key.endswith(unchanged.COUNTER)}


def compare_with_record(options):
    """{domain: entry} of one file, compared with the record next to it."""
    path, = options.state
    checkpoint, model = known(path, options)
    record = unchanged.read(Path(path).parent / unchanged.NAME)
    check_given(options.domains, checkpoint)
    names = names_of(checkpoint, options.domains or record['domains'])
    if names[:len(record['domains'])] != record['domains']:
        raise UserError(f'{path} knows {", ".join(names)}, but {unchanged.NAME} next to it is for '
                        f'{", ".join(record["domains"])}')
    return {name: entry(moved) for name, moved in unchanged.moved_since(record, model).items()}


def read_map(path):
    """{domain: {key prefix in OLD: key prefix in NEW}} of a --map file; UserError if it is something else."""
    try:
        found = json.loads(Path(path).read_text())
        fits = all(isinstance(new, str) for part in found.values() for new in part.values())
    except OSError as error:
        raise UserError(f'--map {path} cannot be read ({error.strerror})') from None
    except (ValueError, AttributeError) as error:
        raise UserError(f'--map {path} is not {{domain: {{key prefix in OLD: key prefix in NEW}}}} ({error})') from None
    if not found or not fits:
        raise UserError(f'--map {path} is not {{domain: {{key prefix in OLD: key prefix in NEW}}}}')
    return found


def mapped(state, prefixes, path, domain):
    """{key in NEW: tensor} of the tensors of OLD whose keys start with one of `prefixes`; the longest prefix counts.

    UserError if there are none.
    """
    result = {}
    for key, value in state.items():
        prefix = max((prefix for prefix in prefixes if key.startswith(prefix)), key=len, default=None)
        if prefix is not None:
            name = prefixes[prefix] + key.removeprefix(prefix)
            if name in result:
                raise UserError(f'--map: two keys of {path} become {name} for {domain}; each needs its '
                                'own prefix in NEW')
            result[name] = value
    if not result:
        raise UserError(f'{path}: no key has a prefix that --map gives for {domain} ({", ".join(prefixes)}); '
                        f'the first is {next(iter(state), "none")!r}')
    return result


def compare_mapped(options):
    """{domain: entry} of two files of other code, compared with --map."""
    old, new = ({key.removeprefix('module.'): value for key, value in state_in(read(path), path).items()}
                for path in options.state)
    result = {}
    for domain, prefixes in read_map(options.map).items():
        before = mapped(old, prefixes, options.state[0], domain)
        after = {key: new[key] for key in before if key in new}
        moved = unchanged.compare(tensor_digests(before), tensor_digests(after), f'{domain} in {options.state[1]}')
        result[domain] = entry(moved)
    return result


def line(name, found):
    """The line to print for a domain."""
    logits = found['logits']
    shown = 'not computed' if logits is None else f'equal on {PROBES} probe images' if not logits else \
        f'differ by up to {logits:.3g}'
    return f'{name}: {"unchanged" if found["unchanged"] else "changed"}; {found["moved"]}; logits {shown}'


def main(argv=None):
    options = parse(argv)
    compare = compare_mapped if options.map else compare_networks if len(options.state) == 2 else compare_with_record
    result = compare(options)
    if options.json:
        write_json(options.json, {'files': options.state, 'domains': result})
    print(*(line(name, found) for name, found in result.items()), sep='\n')
    return 0 if all(found['unchanged'] for found in result.values()) else 1


if __name__ == '__main__':
    run_main(main)
