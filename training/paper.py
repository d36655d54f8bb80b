"""The paper's dialect: options of the published scripts, translated to the native ones.

Nothing but training.options knows it.
"""
from mdil.datasets.domains import domain_names, get_domain
from mdil.utils.errors import UserError
from mdil.utils.parser import data_paths, natural, positive, show

# Options of the published scripts that have no counterpart here, and why.
REFUSED = {
    '--cuda': '--device decides', '--model': '--method decides', '--steps-loss': 'the loss is shown as it changes',
    '--steps-plot': 'curves get a point each epoch', '--epochs-save': 'the latest, the one before and the best are kept',
    '--iouTrain': 'training mIoU is not computed', '--iouVal': 'validation mIoU is always computed',
    '--visualize': '--port sends curves to visdom', '--model-old': '--state names the previous model',
    '--subset': 'eval.py --split names the split'}


def paper_options(parser):
    """Adds the published scripts' options."""
    group = parser.add_argument_group("the paper's options", 'translated to the native ones above')
    many = {'nargs': '+', 'metavar': 'NAME'}
    group.add_argument('--dataset', metavar='NAME', help='the domain to learn')
    group.add_argument('--dataset-new', '--dataset_new', metavar='NAME', help='the domain to learn')
    group.add_argument('--dataset-old', '--dataset_old', help='the domains known', **many)
    group.add_argument('--datasets', help='all domains, in order', **many)
    counts = {'nargs': '+', 'type': positive, 'metavar': 'N'}
    group.add_argument('--num-classes', '--num_classes', help='classes of each domain, void included', **counts)
    group.add_argument('--num-classes-old', '--num_classes_old', help='of the domains known', **counts)
    group.add_argument('--num-classes-new', '--num_classes_new', help='of the domain to learn', **counts)
    group.add_argument('--current-task', '--current_task', type=natural, metavar='N', help='index of the step, from 0')
    group.add_argument('--nb-tasks', '--nb_tasks', type=positive, metavar='N', help='number of domains after the step')
    group.add_argument('--finetune', action='store_true', help='the same as --method fine-tune')
    group.add_argument('--decoder', action='store_true', help='train encoder and decoder (always so)')
    group.add_argument('--pretrainedEncoder', metavar='FILE', help='the same as --state, an ImageNet encoder')


def translate_paper(options):
    """Turns the paper's options into the native ones and removes them from `options`."""
    paper = {name: options.__dict__.pop(name) for name in (
        'dataset', 'dataset_new', 'dataset_old', 'datasets', 'num_classes', 'num_classes_old',
        'num_classes_new', 'current_task', 'nb_tasks', 'finetune', 'decoder', 'pretrainedEncoder')}
    options.domains = paper_domains(paper, options.domains)
    options.method = paper_method(paper, options.method, options.domains)
    if paper['pretrainedEncoder']:
        if options.state and options.state != paper['pretrainedEncoder']:
            raise UserError('--state and --pretrainedEncoder name two files; give one')
        options.state = paper['pretrainedEncoder']
    check_counts(paper, options)


def agree(what, values):
    """The one value of {option: value} that are not None; UserError if they differ."""
    given = {option: value for option, value in values.items() if value is not None}
    if len({str(value) for value in given.values()}) > 1:
        raise UserError(f'{what} contradict: ' + ', '.join(f'{o} {show(v)}' for o, v in given.items()))
    return next(iter(given.values()), None)


def canonical(names):
    """Domain names of aliases; a name that is not built in stays."""
    known = domain_names()
    return names and [known.get(name.lower(), name) for name in names]


def paper_domains(paper, domains):
    """All domains in order, from the paper's options and --domains."""
    one = lambda name: canonical([name])[0] if name else None
    new = agree('domain options', {'--dataset': one(paper['dataset']), '--dataset-new': one(paper['dataset_new'])})
    old = canonical(paper['dataset_old'])
    listed = agree('domain options', {'--domains': canonical(domains), '--datasets': canonical(paper['datasets'])})
    if listed is None:
        return (old or []) + [new] if new else None
    if new and listed[-1] != new:
        raise UserError(f'domain options contradict: the last of {show(listed)} is not {new}')
    if old and listed[:-1] != old:
        raise UserError(f'domain options contradict: --dataset-old {show(old)} are not the first of {show(listed)}')
    return listed


def paper_method(paper, method, domains):
    """The method: --finetune, and the multi-task and single-task argument lists, by their shape; else None.

    The published multi-task list names all of --datasets without a new one or a
    --current-task; the single-task list has --decoder and one domain. Others mean the default.
    """
    implied = None
    if paper['finetune']:
        implied = 'fine-tune'
    elif paper['datasets'] and paper['current_task'] is None and not (paper['dataset'] or paper['dataset_new']):
        implied = 'multi-task'
    elif paper['decoder'] and paper['current_task'] is None and domains and len(domains) == 1:
        implied = 'single-task'
    if paper['finetune'] and method not in (None, 'fine-tune'):
        raise UserError(f'--finetune and --method {method} contradict')
    return method or implied


def check_counts(paper, options):
    """Refuses the paper's class counts and task numbers that do not fit the domains."""
    if not options.domains:
        return
    paths = data_paths(options.data)
    counts = [get_domain(name, paths).num_classes for name in options.domains]
    for option, given, expected in (('--num-classes', paper['num_classes'], counts),
                                    ('--num-classes-old', paper['num_classes_old'], counts[:-1]),
                                    ('--num-classes-new', paper['num_classes_new'], counts[-1:]),
                                    ('--nb-tasks', paper['nb_tasks'], len(counts)),
                                    ('--current-task', paper['current_task'], len(counts) - 1)):
        if given is not None and given != expected:
            raise UserError(f'{option} {show(given)} contradicts the domains {show(options.domains)}: '
                            f'expected {show(expected) or "none"}')
