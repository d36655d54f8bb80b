"""Extracts domains from checkpoints as branch files, and adds branch files to a base checkpoint.

    python -m mdil branches list runs/3/model_best.pth.tar
    python -m mdil branches list idd.branch
    python -m mdil branches extract runs/3/model_best.pth.tar --domain IDD --out idd.branch
    python -m mdil branches add runs/1/model_best.pth.tar bdd.branch idd.branch --out all.pth.tar
    python -m mdil branches remove all.pth.tar --domain BDD --out rest.pth.tar

A branch fits only the shared weights that it was trained with; `add` compares their fingerprints.
The outputs of the remaining domains stay bit-identical.
"""
from pathlib import Path

from mdil.evaluation import tables
from mdil.models import branches, checkpoint
from mdil.models.fingerprint import SHOWN, branch_state, fingerprint, shared_state
from mdil.models.methods import nameless_options
from mdil.models.networks import DEFAULT as ERFNET
from mdil.models.safe_reading import read
from mdil.utils.errors import UserError, printable, run_main
from mdil.utils.files import check_new
from mdil.utils.parser import Parser, data_paths, paths_option

HEADER = ['domain', 'classes', 'values', 'MiB', 'fingerprint']


def parse(argv=None):
    parser = Parser(prog='python -m mdil branches', description='Extracts domains as files, and joins them.')
    actions = parser.add_subparsers(dest='action', required=True, metavar='list|extract|add|remove')
    action(actions, 'list', 'print domains, classes, sizes and fingerprints of a checkpoint or a branch file')
    one = action(actions, 'extract', 'write one domain as a branch file'), action(actions, 'remove', 'drop one domain')
    for part in one:
        part.add_argument('--domain', required=True, metavar='NAME', help='the domain')
    add = action(actions, 'add', 'add branch files to a base checkpoint')
    add.add_argument('branches', nargs='+', metavar='BRANCH', help='branch files, in the order of the domains')
    for part in (*one, add):
        part.add_argument('--out', required=True, metavar='FILE', help='the file to write')
        part.add_argument('--overwrite', action='store_true', help='replace it if it exists')
    return parser.parse_args(argv)


def action(actions, name, text):
    """The parser of the action `name`, with the options that all actions share."""
    parser = actions.add_parser(name, help=text, description=f'{text[0].upper()}{text[1:]}.')
    kinds = 'checkpoint, published ones too' + (', or branch file' if name == 'list' else '')
    parser.add_argument('state', metavar='BASE' if name == 'add' else 'CKPT', help=kinds)
    nameless_options(parser)
    paths_option(parser)
    return parser


def row(name, classes, state):
    """A row of `list`: name, classes, then number of values, MiB and fingerprint of the tensors in `state`."""
    tensors = state.values()
    return [name, classes, f'{sum(value.numel() for value in tensors):,}',
            tables.number(sum(value.nbytes for value in tensors) / 2 ** 20), fingerprint(state)[:SHOWN]]


def listing(known):
    """The text that `list` prints."""
    rows = [row(entry['name'], f'{entry["classes"] - 1} + void', branch_state(known.model, number))
            for number, entry in enumerate(known.entries)]
    rows.append(row('shared by all', '', shared_state(known.model)))
    return (f'{known.checkpoint.source}: {known.method}, {known.checkpoint.layout.kind}\n\n'
            + tables.plain(HEADER, rows))


def branch_listing(options, paths):
    """The text that `list` prints about a branch file."""
    if options.domains or options.method:
        raise UserError(f'--domains and --method are for checkpoints that do not say them; {options.state} does')
    path, branch = options.state, branches.read_branch(options.state, paths)
    entry = branch['domain']
    rows = [row(entry['name'], f'{entry["classes"] - 1} + void', branch['state'])]
    return (f'{path}: branch of {branch["method"]}, {branch.get("network", ERFNET)}; fits the shared weights '
            f'{branch["base"][:SHOWN]}\n\n' + tables.plain(HEADER, rows)
            + ('\n\n' + printable(', '.join(entry['class_names'])) if 'class_names' in entry else ''))


def make(known, options):
    """(content of the file to write, its description in words)."""
    if options.action == 'extract':
        content = branches.extract(known, options.domain)
        return content, f'branch of {content["domain"]["name"]}, shared weights {content["base"][:SHOWN]}'
    if options.action == 'add':
        files = [(path, branches.read_branch(path, known.paths)) for path in options.branches]
        content = branches.joined(known, files)
    else:
        content = branches.without(known, options.domain)
    return content, f'knows {", ".join(entry["name"] for entry in content["domains"])}'


def main(argv=None):
    options = parse(argv)
    if options.action != 'list':
        check_new('--out', options.out, options.overwrite, [options.state, *getattr(options, 'branches', [])])
    paths = data_paths(options.data)
    if options.action == 'list' and checkpoint.is_branch(read(options.state)):
        print(branch_listing(options, paths))
        return
    known = branches.LoadedCheckpoint(options.state, options.domains, options.method, paths)
    if options.action == 'list':
        print(listing(known))
        return
    content, about = make(known, options)
    checkpoint.save(content, options.out)
    print(f'{options.out}: {about}; {Path(options.out).stat().st_size / 2 ** 20:.2f} MiB')


if __name__ == '__main__':
    run_main(main)
