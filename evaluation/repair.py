"""Restores what later steps changed in old domains, from the checkpoints of the steps that learnt them.

    python -m mdil repair STEP1 STEP2 STEP3 --out repaired.pth.tar
    python -m mdil repair STEP1 STEP2 STEP3 --out repaired.pth.tar --what branch --data-root DATA

`statistics`, the default, restores the running statistics of each old domain's own batch norms;
`branch` restores its whole branch. The shared weights and the newest domain stay as they are. With
--data-root, every domain is evaluated before and after.
"""
import copy
from dataclasses import dataclass

from mdil.evaluation import tables
from mdil.evaluation.evaluation import Evaluator
from mdil.evaluation.predictor import trained_size
from mdil.models import METHODS, checkpoint
from mdil.models.branches import WHAT, LoadedCheckpoint, put_back
from mdil.models.fingerprint import branch_state, misfits
from mdil.models.methods import nameless_options
from mdil.utils.errors import UserError, run_main
from mdil.utils.files import check_new
from mdil.utils.parallel import session
from mdil.utils.parser import Parser, complete_size, data_options, data_paths, machine_options, positive, size_options
from mdil.utils.precision import memory_format

# Options that an Evaluator reads and that this tool does not offer.
EVALUATION = {'split': 'val', 'resolution': 'published', 'published_metric': False, 'common_classes': False}


@dataclass(frozen=True)
class Source:
    """Where a domain's branch comes from: branch `number` of `known`; learnt: whether that file's step learnt it."""
    known: LoadedCheckpoint
    number: int
    learnt: bool


def parse(argv=None):
    parser = Parser(prog='python -m mdil repair',
                    description='Restores what later steps changed in old domains.')
    parser.add_argument('states', nargs='+', metavar='OLD... NEW', help='checkpoints of the steps, in order')
    parser.add_argument('--out', required=True, metavar='FILE', help='the file to write')
    parser.add_argument('--overwrite', action='store_true', help='replace it if it exists')
    parser.add_argument('--what', choices=WHAT, default='statistics',
                        help="running statistics of each old domain's batch norms, or its whole branch")
    nameless_options(parser, ' of NEW')
    group = data_options(parser)
    group.set_defaults(data_root=None)
    group = parser.add_argument_group('evaluation before and after, with --data-root')
    size_options(group, None)
    group.add_argument('--batch-size', type=positive, default=6, help='images per batch')
    group.add_argument('--limit-batches', type=positive, metavar='N', help='at most N batches per domain, for trials')
    machine_options(parser)
    parser.set_defaults(**EVALUATION)
    options = parser.parse_args(argv)
    complete_size(options)
    if len(options.states) < 2:
        raise UserError('repair needs the file to repair and those of earlier steps: OLD... NEW')
    check_new('--out', options.out, options.overwrite, options.states)
    return options


def sources(older, new):
    """{old domain of the LoadedCheckpoint `new`: its Source}, the first of `older` (in step order) that has it.

    UserError if an old domain is in none of them, or if there is no old domain.
    """
    found = {}
    for known in older:
        for number, name in enumerate(known.names):
            if name in new.names[:-1] and name not in found:
                learnt = number == len(known.names) - 1 or METHODS[known.method].joint
                found[name] = Source(known, number, learnt)
                check_same_branch(known, number, new, name)
    missing = [name for name in new.names[:-1] if name not in found]
    if missing or not found:
        raise UserError(f'{new.checkpoint.source} contains {", ".join(new.names)}; '
                        + (f'no earlier file contains {", ".join(missing)}' if missing else 'it has no old domain'))
    return found


def check_same_branch(known, number, new, name):
    """UserError unless a domain's branch has tensors of the same names and shapes in `known` and `new`."""
    if known.network != new.network:
        raise UserError(f'{known.checkpoint.source} holds {known.network}, {new.checkpoint.source} holds {new.network}')
    one, other = branch_state(known.model, number), branch_state(new.model, new.names.index(name))
    if odd := misfits(one, other):
        raise UserError(f'{known.checkpoint.source}: the branch of {name} ({known.method}) differs from that in '
                        f'{new.checkpoint.source} ({new.method}): {odd[0]}')


def scores(known, evaluator):
    """{domain: mIoU} of a LoadedCheckpoint, whose own network stays on the CPU."""
    place, domains = evaluator.place, [evaluator.domain(name) for name in known.names]
    checkpoint.check_known(known.checkpoint, domains)
    model = copy.deepcopy(known.model).to(
        place.device, memory_format=memory_format(place.device, evaluator.options.precision))
    return {domain.name: evaluator.score(model, number, domain).miou() for number, domain in enumerate(domains)}


def repair(new, found, what):
    """Copies tensors from the Sources `found` into `new`; returns a line of text for each old domain."""
    lines = []
    for name, source in found.items():
        moved = put_back(source.known.model, source.number, new.model, new.names.index(name), what)
        line = f'{name}: {len(moved)} tensors restored from {source.known.checkpoint.source}'
        if not source.learnt:
            line += f', where it was an old domain already; the file of the step that learnt {name} may be better'
        lines.append(line)
    return lines


def content_of(known):
    """The content of the repaired file: a checkpoint, with epoch, options and best mIoU of the original."""
    kept = {name: known.checkpoint.content[name] for name in ('epoch', 'options') if name in known.checkpoint.content}
    if 'best_acc' in known.checkpoint.content:      # a numpy number in published files
        kept['best_acc'] = float(known.checkpoint.content['best_acc'])
    return {**known.content(), **known.about(), **kept}


def table(before, after):
    """The mIoU of every domain before and after, as a text table."""
    rows = [[name, tables.number(value), tables.number(after[name]), f'{after[name] - value:+.2f}']
            for name, value in before.items()]
    return tables.plain(['domain', 'mIoU before', 'after', 'difference'], rows)


def main(argv=None):
    options = parse(argv)
    last = len(options.states) - 1
    *older, new = (LoadedCheckpoint(path, options.domains, options.method, data_paths(options.data),
                                    sequence=number < last) for number, path in enumerate(options.states))
    found = sources(older, new)
    if options.height is None:
        options.height, options.width = trained_size(new.checkpoint.content)
    with session(options.device, precision=options.precision) as place:
        evaluator = Evaluator(options, place) if options.data_root else None
        before = scores(new, evaluator) if evaluator else None
        print(*repair(new, found, options.what), sep='\n')
        checkpoint.save(content_of(new), options.out)
        print(f'{options.out}: written')
        if evaluator:
            print('\n' + table(before, scores(new, evaluator)))


if __name__ == '__main__':
    run_main(main)
