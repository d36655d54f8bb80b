"""The paper's dialect: options of the published scripts, translated to the native ones.

Behind the parsers, no code knows these options.
"""
from mdil.datasets.domains import canonical, get_domain
from mdil.utils.errors import UserError
from mdil.utils.parser import data_paths, flag, natural, positive, show

JOINT = 'multi-task'
# Options of the published scripts that have no counterpart here, and why.
REFUSED = {
    '--cuda': '--device decides', '--model': '--method decides', '--steps-loss': 'the loss is shown as it changes',
    '--steps-plot': 'curves get a point each epoch',
    '--epochs-save': 'the latest, the one before and the best are kept',
    '--iouTrain': 'training mIoU is not computed', '--iouVal': 'validation mIoU is always computed',
    '--visualize': '--port sends curves to visdom', '--model-old': '--state names the previous model',
    '--subset': 'eval.py --split names the split', '--dlr': 'the published code reads it nowhere; --lr is the rate'}


def paper_options(parser):
    """Adds the published scripts' options."""
    group = parser.add_argument_group("the paper's options", 'translated to the native ones above')
    many = {'nargs': '+', 'metavar': 'NAME'}
    group.add_argument('--dataset', metavar='NAME',
                       help='the domain to learn; with a multi-task list, a name for the run')
    group.add_argument('--dataset-new', '--dataset_new', metavar='NAME', help='the domain to learn')
    group.add_argument('--dataset-old', '--dataset_old', help='the earlier domains', **many)
    group.add_argument('--datasets', help='all domains, in order', **many)
    counts = {'nargs': '+', 'type': positive, 'metavar': 'N'}
    group.add_argument('--num-classes', '--num_classes', help='classes of each domain, void included', **counts)
    group.add_argument('--num-classes-old', '--num_classes_old', help='classes of the earlier domains', **counts)
    group.add_argument('--num-classes-new', '--num_classes_new', help='classes of the domain to learn', **counts)
    group.add_argument('--current-task', '--current_task', type=natural, metavar='N', help='index of the step, from 0')
    group.add_argument('--nb-tasks', '--nb_tasks', type=positive, metavar='N', help='number of domains after the step')
    group.add_argument('--finetune', action='store_true', help='the same as --method fine-tune')
    group.add_argument('--decoder', action='store_true',
                       help='with one domain and no task number: the same as --method single-task')
    group.add_argument('--pretrainedEncoder', metavar='FILE', help='the same as --state, an ImageNet encoder')


def translate_paper(options):
    """Replaces the paper's options in `options` by the native ones; returns whether any was given."""
    paper = {name: options.__dict__.pop(name) for name in (
        'dataset', 'dataset_new', 'dataset_old', 'datasets', 'num_classes', 'num_classes_old',
        'num_classes_new', 'current_task', 'nb_tasks', 'finetune', 'decoder', 'pretrainedEncoder')}
    given = any(value is not None and value is not False for value in paper.values())      # task 0 counts as given
    method = options.method = paper_method(paper, options)
    if method == JOINT and paper['dataset']:
        options.model_name_suffix = '-'.join(filter(None, (paper.pop('dataset'), options.model_name_suffix)))
    if method == JOINT and paper['current_task'] == 0:
        paper['current_task'] = None        # the default in the published multi-task list
    options.domains = paper_domains(paper, options.domains)
    if paper['pretrainedEncoder']:
        if options.state and options.state != paper['pretrainedEncoder']:
            raise UserError('--state and --pretrainedEncoder name two files; give one')
        options.state = paper['pretrainedEncoder']
    check_counts(paper, options)
    return given


def agree(values):
    """The one value in {option: value} that is not None, or None; UserError if there are different ones."""
    given = {option: value for option, value in values.items() if value is not None}
    if len({str(value) for value in given.values()}) > 1:
        raise UserError('domain options contradict: ' + ', '.join(f'{o} {show(v)}' for o, v in given.items()))
    return next(iter(given.values()), None)


def paper_domains(paper, domains):
    """All domains in order, from the paper's options and --domains."""
    one = lambda name: canonical(name) if name else None
    many = lambda names: names and list(map(canonical, names))
    new = agree({'--dataset': one(paper.get('dataset')), '--dataset-new': one(paper['dataset_new'])})
    old = many(paper['dataset_old'])
    listed = agree({'--domains': many(domains), '--datasets': many(paper['datasets'])})
    if listed is None and not new and not old and (paper['decoder'] or paper['current_task'] == 0):
        return ['cityscapes']       # the default of the published lists
    if listed is None:
        return (old or []) + [new] if new else None
    if new and listed[-1] != new:
        raise UserError(f'domain options contradict: the last of {show(listed)} is not {new}')
    if old and listed[:-1] != old:
        raise UserError(f'domain options contradict: --dataset-old {show(old)} are not the first of {show(listed)}')
    return listed


def paper_method(paper, options):
    """The method: --method, else that of the published script with such arguments; None if they do not tell.

    - The paper's method has --num-classes-old in later steps. It alone has --lambdac.
    - Fine-tuning has --dataset-old and --dataset-new; from step 3 on, --datasets and a new domain or a
      task number, without --num-classes-old. Without --finetune, only the new decoder trains.
    - Multi-task has all --datasets; its --dataset is a name for the run.
    - Single-task has --decoder and one domain.
    """
    if paper['finetune'] and options.method not in (None, 'fine-tune'):
        raise UserError(f'--finetune and --method {options.method} contradict')
    given = {name for name, value in paper.items() if value}
    later = given & {'dataset_new', 'dataset_old', 'current_task', 'num_classes_old', 'num_classes_new'}
    second = {'dataset_old', 'dataset_new'} <= given and not given & {'num_classes', 'current_task', 'nb_tasks'}
    third = {'datasets', 'num_classes'} <= given and given & {'dataset_new', 'current_task'}
    if options.method or paper['finetune']:
        return options.method or 'fine-tune'
    if options.lambdac is None and (second or third and 'num_classes_old' not in given):
        return 'feature-extraction'
    if 'datasets' in given and not later:
        return JOINT
    if paper['decoder'] and not later and paper['current_task'] is None and len(options.domains or ['one']) == 1:
        return 'single-task'
    return None


def check_counts(paper, options):
    """Refuses class counts and task numbers of the paper's options that do not fit the domains."""
    names, paths = options.domains, data_paths(options.data)
    if not names:
        return
    expected = {'nb_tasks': len(names), 'current_task': len(names) - 1}
    for option, domains in (('num_classes', names), ('num_classes_old', names[:-1]), ('num_classes_new', names[-1:])):
        if paper[option] is not None:
            expected[option] = [get_domain(name, paths).num_classes for name in domains]
    for name, value in expected.items():
        if paper[name] is not None and paper[name] != value:
            raise UserError(f'{flag(name)} {show(paper[name])} contradicts the domains {show(names)}: '
                            f'expected {show(value) or "none"}')
