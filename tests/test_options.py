"""The paper's commands, translated or refused; recipes and what overrides them."""
import re

import pytest

from mdil.benchmarks.forgetting import forgetting_parser
from mdil.datasets.domains import DOMAINS
from mdil.models import build_model, checkpoint
from mdil.models.methods import DISTILLING, METHODS, PAPER
from mdil.training.options import RECIPES, parse_train, train_parser
from mdil.training.resume import differences
from mdil.utils.errors import UserError
from tests.conftest import ROOT

README = {
    1: "--savedir S --num-epochs 150 --batch-size 6 --state trained_models/erfnet_encoder_pretrained.pth.tar "
       "--num-classes 20 --current_task=0 --dataset=cityscapes",
    2: "--savedir S --num-epochs 150 --model-name-suffix=ours-CS1-BDD2 --batch-size 6 --state STEP1 --dataset=BDD "
       "--dataset_old=cityscapes --num-classes 20 20 --current_task=1 --nb_tasks=2 --num-classes-old 20",
    3: "--savedir S --num-epochs 150 --model-name-suffix=OURS-CS1-BDD2-IDD3 --batch-size 6 --state STEP2 "
       "--dataset-new=IDD --datasets cityscapes BDD IDD --num-classes 20 20 27 --num-classes-old 20 20 "
       "--current_task=2 --nb_tasks=3 --lambdac=0.1"}


def parse(text):
    return parse_train(text.split())


@pytest.mark.parametrize('step', [1, 2, 3])
def test_readme_commands(step):
    options = parse(README[step])
    assert options.domains == ['cityscapes', 'BDD', 'IDD'][:step] and options.method == 'mdil'
    native = parse(f'--domains {" ".join(options.domains)} --savedir S --state {options.state} --model-name-suffix '
                   f'{options.model_name_suffix or "x"}')
    native.model_name_suffix = options.model_name_suffix
    assert vars(native) == vars(options)
    assert (options.lambdac, options.height, options.width, options.num_epochs, options.batch_size) == \
        (0.1, 512, 1024, 150, 6)


@pytest.mark.parametrize('text, said', [
    (README[1], "the paper's options mean --method mdil --domains cityscapes --recipe corrected\n"),
    ('--savedir S --domains CS --current-task 0', "the paper's options mean --method mdil --domains cityscapes --recipe corrected\n"),
    ('--savedir S --domains CS', '')])
def test_what_the_papers_options_mean_is_said_on_standard_error(text, said, capsys):
    parse(text)
    assert capsys.readouterr() == ('', said)


FT2 = '--state X --dataset-old CS --dataset-new BDD --num-classes-old 20 --num-classes-new 20'
FT3 = '--state X --datasets cityscapes BDD IDD --num-classes 20 20 27 --current_task=2 --nb_tasks=3 --dataset-new=IDD'
THREE = ['cityscapes', 'BDD', 'IDD']


@pytest.mark.parametrize('text, method, domains', [
    (f'{FT2} --finetune', 'fine-tune', ['cityscapes', 'BDD']),
    (f'{FT3} --finetune', 'fine-tune', THREE),
    ('--state X --dataset-old CS BDD --dataset-new IDD --num-classes-old 20 20 --num-classes-new 27 --finetune',
     'fine-tune', THREE),
    (FT2, 'feature-extraction', ['cityscapes', 'BDD']), (FT3, 'feature-extraction', THREE),
    ('--state X --dataset-old CS --dataset-new BDD', 'feature-extraction', ['cityscapes', 'BDD']),
    (f'{FT3} --num-classes-old 20 20', 'mdil', THREE), (f'{FT3} --lambdac 0.1', 'mdil', THREE),
    ('--state X --datasets CS BDD IDD --num-classes 20 20 27 --num-classes-old 20 20', 'mdil', THREE),
    ('--datasets CS BDD IDD --num-classes 20 20 27 --nb_tasks=3', 'multi-task', THREE),
    ('--datasets CS BDD IDD --num-classes 20 20 27 --nb_tasks=3 --current_task 0', 'multi-task', THREE),
    ('--state E --dataset=CSIDD --datasets CS IDD --num-classes 20 27 --nb_tasks=2', 'multi-task', ['cityscapes', 'IDD']),
    ('--decoder --pretrainedEncoder FILE --dataset IDD --num-classes 27', 'single-task', ['IDD']),
    ('--decoder --pretrainedEncoder FILE', 'single-task', ['cityscapes']),
    ('--state E --num-classes 20 --current_task=0', 'mdil', ['cityscapes'])])
def test_published_bash_lists(text, method, domains):
    options = parse(f'--savedir S {text}')
    assert (options.method, options.domains) == (method, domains)
    if 'pretrainedEncoder' in text:
        assert options.state == 'FILE'


def test_the_dataset_of_a_multi_task_list_names_the_run():
    text = '--savedir S --dataset=CSIDD --datasets CS IDD'
    assert parse(text).model_name_suffix == 'CSIDD' and parse(f'{text} --model-name-suffix MT').model_name_suffix == 'CSIDD-MT'


@pytest.mark.parametrize('text, message', [
    (README[2].replace('--num-classes 20 20', '--num-classes 20 27'), '--num-classes 20 27 contradicts'),
    (README[2].replace('--num-classes-old 20', '--num-classes-old 19'), '--num-classes-old 19'),
    (README[3].replace('--current_task=2', '--current_task=1'), '--current-task 1'),
    (README[3].replace('--nb_tasks=3', '--nb_tasks=2'), '--nb-tasks 2'),
    (README[3].replace('--dataset-new=IDD', '--dataset-new=BDD'), 'contradict'),
    (README[2] + ' --domains BDD cityscapes', 'contradict'),
    (README[2].replace('--state STEP1', ''), '--state is missing'),
    (README[1] + ' --finetune --method ours', 'contradict'),
    (README[1] + ' --pretrainedEncoder OTHER', 'two files'),
    ('--savedir S', '--domains'),
    ('--savedir S --domains mars', "unknown domain 'mars'"),
    ('--savedir S --domains CS cityscapes --state x', 'twice'),
    ('--savedir S --domains CS BDD --method single-task', 'learns one domain'),
    ('--savedir S --domains CS --height 100', 'multiple of 8'),
    ('--savedir S --domains CS --lambdac nan', 'finite'),
    ('--savedir S --domains CS --batch-size 0', 'at least 1'),
    ('--savedir S --domains CS --nonsense', r'--nonsense \(--help lists the options'),
    ('--savedir S --domain CS', r'unrecognized arguments: --domain CS \(did you mean --domains\?\)'),
    ('--savedir S --domains CS BDD --state x --recipe released --temperature 1', '--temperature is for --distillation kl'),
    ('--savedir S --domains CS BDD --state x --distillation released --temperature 4', 'or add --distillation kl'),
    ('--savedir S --domains CS --steps-loss 50 --cuda', '--cuda: --device decides; --steps-loss: the loss is shown'),
    ('--savedir S --datasets CS IDD --dlr=100', '--dlr: the published code reads it nowhere'),
    ('--savedir S --datasets CS IDD --current_task 1 --num-classes 20 27', '--state is missing'),
    ('--savedir S --domains CS --data nowhere', 'NAME=PATH'),
    ('--savedir S --domains CS --data CS=a --data IDD=c --data CS=b', 'two paths for CS, a and b'),
    ('--savedir S --domains CS --data CS=a --data cityscapes=b', 'two paths for cityscapes, a and b')])
def test_contradictions_and_bad_values_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse(text)


@pytest.mark.parametrize('text', ['--domains usa IDD', '--domains IDD usa --state a.pth', '--domains usa --state a.pth'])
def test_a_domain_that_no_file_describes_needs_its_declaration(text):
    with pytest.raises(UserError, match="unknown domain 'usa'.* pass --data usa=FOLDER"):
        parse(f'{text} --savedir x')
    assert parse('--domains usa ImaGeNot IDD --state a.pth --savedir x').domains == ['usa', 'ImaGeNot', 'IDD']
    old = parse('--dataset-new IDD --dataset-old usa --state a.pth --savedir x --current-task 1 --num-classes-new 27')
    assert old.domains == ['usa', 'IDD']


def test_a_recipe_is_a_set_of_options_and_explicit_ones_win():
    two = parse('--savedir S --domains CS BDD --state x --recipe released')
    three = parse('--savedir S --domains CS BDD IDD --state x --recipe released')
    assert (two.old_bn, two.distillation, two.teacher_mode, two.steps_per_batch, two.new_statistics) == \
        ('released', 'released', 'eval', 1, 'fresh')
    assert (three.teacher_mode, three.steps_per_batch) == ('train', 2)
    assert (two.val_every, three.val_every, three.num_epochs, three.label_padding) == (1, 10, 150, 'released')
    mixed = parse('--savedir S --domains CS BDD --state x --recipe released --old-bn frozen --no-published-metric')
    assert (mixed.old_bn, mixed.published_metric, mixed.distillation) == ('frozen', False, 'released')
    corrected = parse('--savedir S --domains CS BDD --state x --method mdil --teacher-mode train')
    assert (corrected.old_bn, corrected.teacher_mode, corrected.published_metric) == ('frozen', 'train', False)


@pytest.mark.parametrize('method, domains, expected', [
    ('mdil', 'CS IDD', ('copied', 'dropped', 'eval', 1, 150)), ('fine-tune', 'CS IDD', ('fresh', 'loaded', 'train', 1, 150)),
    ('feature-extraction', 'CS BDD IDD', ('fresh', 'loaded', 'train', 10, 150)),
    ('multi-task', 'CS IDD', ('fresh', 'loaded', 'train', 5, 150)),
    ('single-task', 'IDD', ('fresh', 'loaded', 'train', 1, 200)), ('single-task', 'CS', ('fresh', 'loaded', 'train', 1, 150))])
def test_the_released_recipe_is_that_of_the_methods_own_loop(method, domains, expected):
    found = parse(f'--savedir S --domains {domains} --state x --method {method} --recipe released')
    names = 'new_decoder', 'imagenet_bn', 'frozen_encoder', 'val_every', 'num_epochs'
    assert tuple(getattr(found, name) for name in names) == expected and found.rounds == 'smallest'
    plain = parse(f'--savedir S --domains {domains} --state x --method {method}')
    assert tuple(getattr(plain, name) for name in names) == ('copied', 'loaded', 'eval', 1, 150)


def test_the_default_method_is_the_papers_in_both_dialects_and_its_published_name_is_an_alias():
    after = '--savedir S --domains CS BDD --state x'
    texts = '', '--recipe released', '--current-task 1', '--method ours', '--lambdac 0.1 --shared-lr 0'
    assert {parse(f'{after} {text}').method for text in texts} == {'mdil'}
    assert parse(f'{after} --method lwf').method == 'lwf'
    assert parse('--savedir S --domains CS').method == parse('--savedir S --domains CS --current-task 0').method == 'mdil'
    paper = parse('--savedir S --dataset-old CS --dataset-new BDD --state x --lambdac 0.3')
    assert (paper.method, paper.lambdac, paper.shared_lr, paper.no_dropout) == ('mdil', 0.3, 5e-6, False)


VALUES = {'no_dropout': '', 'new_decoder': 'copied', 'frozen_encoder': 'eval', 'rounds': 'largest', 'distillation': 'kl', 'teacher_mode': 'eval', 'old_bn': 'frozen', 'new_statistics': 'copied'}
OF_SOME = sorted({name for row in METHODS.values() for name in row.uses})


@pytest.mark.parametrize('method', METHODS)
def test_an_option_that_the_method_does_not_use_is_refused_even_at_its_default(method):
    row = METHODS[method]
    domains = 'CS' if row.one_domain else 'CS BDD --state x'
    for name in OF_SOME:
        option = f'--{name.replace("_", "-")}'
        text = f'--savedir S --domains {domains} --method {method} {option} {VALUES.get(name, 1)}'
        if name in row.uses:
            parse(text)
            continue
        with pytest.raises(UserError) as error:
            parse(text)
        fitting = [other for other in METHODS if name in METHODS[other].uses]
        assert str(error.value) == (f'--method {method} does not use {option}; leave it out, '
                                    f'or choose a method that does: {", ".join(fitting)}')


def test_several_options_that_the_method_does_not_use_are_refused_in_one_line():
    with pytest.raises(UserError) as error:
        parse('--savedir S --domains CS BDD --state x --method feature-extraction --lambdac 0 --dropout')
    assert str(error.value).startswith('--method feature-extraction does not use --lambdac --dropout; ')


def test_help_shows_the_defaults_that_say_something():
    shown = ' '.join(train_parser().format_help().split())
    assert 'FILE checkpoint of the previous step, or an ImageNet encoder of ERFNet --savedir' in shown
    assert 'dropout (default: 0)' in shown and 'repeatable --cache' in shown
    assert '--seeds N [N ...] seeds (default: 0 1 2)' in ' '.join(forgetting_parser().format_help().split())


def test_the_temperature_is_that_of_kl_whatever_the_recipe():
    text = '--savedir S --domains CS BDD --state x --recipe released --distillation kl --temperature 4'
    assert parse(text).temperature == 4


def test_a_step_keeps_the_size_of_the_step_before_unless_one_is_given(tmp_path):
    checkpoint.save({'version': 1, 'state_dict': build_model([20]).state_dict(), 'domains': [DOMAINS['cityscapes'].entry],
                     'options': {'height': 32, 'width': 96}}, tmp_path / 'one')
    later = f'--savedir S --domains CS BDD --state {tmp_path}/one'
    size = lambda text: (parse(text).height, parse(text).width)
    assert size(later) == (32, 96) and size(f'{later} --recipe released') == (32, 96)
    assert size(f'{later} --height 64') == (64, 128) and size(f'{later} --width 64') == (512, 64)
    assert size(f'--savedir S --domains CS --state {tmp_path}/one') == size(f'{later}.gone') == (512, 1024)
    assert size(README[2].replace('STEP1', f'{tmp_path}/one')) == (512, 1024)       # the published default
    (tmp_path / 'one').write_bytes(b'damaged')      # reported when it is loaded
    assert size(later) == (512, 1024)
    again = f'{later} --resume --savedir {tmp_path}'
    assert size(again) == (512, 1024)
    (tmp_path / 'opts.json').write_text('{"options": {"height": 16, "width": 48}}')     # of a run from before the damage
    assert size(again) == (16, 48) and size(f'{later} --savedir {tmp_path}') == (512, 1024)


def test_width_follows_height_unless_given():
    assert parse('--savedir S --domains CS --height 256').width == 512
    assert parse('--savedir S --domains CS --height 256 --width 256').width == 256


def table_rows(page, heading):
    """{first cell's code: other cells} of the table below a heading of a page in docs/."""
    text = (ROOT / 'docs' / page).read_text().split(f'\n## {heading}\n')[1].split('\n## ')[0]
    lines = [[cell.strip() for cell in line.strip('|').split(' | ')] for line in text.splitlines() if line.startswith('| `')]
    return {re.match(r'`([^`]+)`', cells[0].strip('| ')).group(1): cells[1:] for cells in lines}


def test_the_documented_recipes_are_the_options_own():
    rows = table_rows('methods.md', 'Recipes')
    assert set(rows) == {f'--{name.replace("_", "-")}' for name in RECIPES['corrected']}
    assert RECIPES['corrected'].keys() == RECIPES['released'].keys()
    for recipe, column in (('corrected', 0), ('released', 1)):
        for name, value in RECIPES[recipe].items():
            cell = rows[f'--{name.replace("_", "-")}'][column]
            found = {value} if not callable(value) else {
                value(row, domains) for row in METHODS.values() for domains in (['IDD'], ['CS'], ['CS', 'BDD'], THREE)}
            words = {{True: 'on', False: 'off'}.get(one, str(one)) if isinstance(one, bool) else str(one) for one in found}
            assert set(re.findall(r'`([^`]+)`', cell)) == words or {cell} == words, (name, cell, words)


def test_the_fast_recipe_is_the_documented_one_and_what_is_given_wins():
    changed = dict(RECIPES['fast'].items() - RECIPES['corrected'].items())
    words = re.search(r'`--recipe fast` is `corrected` with `([^`]+)`', (ROOT / 'docs/methods.md').read_text()).group(1)
    start = '--savedir S --domains CS'
    assert vars(parse(f'{start} --recipe fast')) == {**vars(parse(f'{start} {words}')), 'recipe': 'fast'}
    assert changed.keys() == {'schedule', 'lr', 'no_dropout'}
    given = parse(f'{start} --recipe fast --lr 1e-3 --dropout --schedule poly')
    assert vars(given) == {**vars(parse(f'{start} --lr 1e-3')), 'recipe': 'fast'}
    later = parse('--savedir S --domains CS BDD --state x --recipe fast')
    assert (later.lr, later.shared_lr, later.no_dropout) == (4e-3, 5e-6, True)


def test_the_documented_methods_use_what_their_rows_say():
    rows = table_rows('methods.md', 'Methods')
    rows.pop('--method')
    assert list(rows) == list(METHODS)
    for name, cells in rows.items():
        named = set(re.findall(r'`--([a-z-]+)`', cells[-1].split('without')[0]))
        used = {option.replace('_', '-') for option in METHODS[name].uses}
        if 'as `mdil`' in cells[-1]:
            left_out = {option.strip('`-') for option in cells[-1].partition('without ')[2].split()}
            assert used == {option.replace('_', '-') for option in PAPER} - left_out
        elif 'all distillation options' in cells[-1]:
            assert used == named | {option.replace('_', '-') for option in DISTILLING}
        else:
            assert used == named


def test_a_run_from_before_an_option_resumes_only_with_what_it_did_then():
    now = parse('--savedir S --domains CS --network erfnet')
    newer = 'schedule', 'rounds', 'sync_bn', 'weights', 'network'
    before = {name: value for name, value in vars(now).items() if name not in newer}
    assert differences(before, now) == ([], [])
    now.schedule, now.sync_bn = 'one-cycle', True
    assert differences(before, now) == (['--schedule was None, is one-cycle', '--sync-bn was None, is True'], [])
