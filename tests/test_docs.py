"""The documentation: its code runs, its commands are accepted, its links lead somewhere."""
import doctest
import importlib
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mdil
from mdil.__main__ import TOOLS, run
from mdil.datasets import check
from mdil.datasets.domains import DOMAINS, get_domain
from mdil.datasets.pairs import find_split
from mdil.models import METHODS, build_model, checkpoint
from mdil.models.identify import statistics_of
from mdil.models.networks import NETWORKS
from mdil.training.options import parse_train
from mdil.training.step_loss import StepLoss
from mdil.utils.parser import Parser
from tests.conftest import ROOT
from tests.test_trainer_files import commands, script

PAGES = sorted([*ROOT.glob('*.md'), *ROOT.glob('docs/*.md'), *ROOT.glob('examples/*/*.md')])
SCRIPTS = {'train.py': 'mdil.train', 'eval.py': 'mdil.eval', 'predict.py': 'mdil.predict'}


class Parsed(Exception):
    """A parser accepted its arguments."""


def blocks(page, language=''):
    """Contents of the page's code blocks that are marked with `language`."""
    found = re.findall(r'^```(\w*)\n(.*?)^```$', page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [block for marked, block in found if marked == language]


def code(page, word):
    """The page's one block of Python that holds `word`."""
    block, = [block for block in blocks(page, 'python') if word in block]
    return block


def shown_commands(page):
    """Command lines of the page's blocks, but for those of old revisions and with parts left out."""
    for block in blocks(page):
        if 'git checkout' in block:
            continue
        lines = (line.split('  #')[0].strip() for line in block.replace('\\\n', ' ').splitlines())
        yield from (part for line in lines for part in line.split(' && ') if ' ...' not in part)


def run_to_the_parser(words):
    """Runs a command of the project up to where its options are parsed."""
    if words[:2] == ['python', '-m']:
        _, _, name, *words = words
        if name == 'mdil' or name.startswith('tests.'):
            name, *words = words
            name = TOOLS[name][0]
        else:
            name = f'mdil.{name}'
    else:
        _, name, *words = words
        name = SCRIPTS[name]
    importlib.import_module(name).main(words)


COMMANDS = sorted({line for page in PAGES for line in shown_commands(page)
                   if line.startswith(('python -m mdil ', 'python -m datasets.', 'python -m benchmarks.', 'python -m tests.',
                                       'python train.py', 'python eval.py', 'python predict.py'))})


@pytest.mark.parametrize('line', COMMANDS)
def test_commands_are_accepted(line, monkeypatch):
    parse_args = Parser.parse_args

    def stop(*arguments, **keywords):
        parse_args(*arguments, **keywords)
        raise Parsed
    monkeypatch.setattr(Parser, 'parse_args', stop)
    monkeypatch.setitem(METHODS, 'ewc', METHODS['fine-tune'])
    with pytest.raises(Parsed):
        run_to_the_parser(shlex.split(re.sub(r'-m mdil torchrun .*?(?=train.py)', '', line)))


@pytest.mark.parametrize('line', sorted({line for page in PAGES for line in shown_commands(page)
                                         if line.startswith('bash trainer_files/') and 'setup' not in line}))
def test_scripts_run_what_train_py_accepts(line, tmp_path, monkeypatch):
    (tmp_path / 'path/to/cambridge').mkdir(parents=True)
    (tmp_path / 'path/to/cambridge/domain.json').write_text(blocks(ROOT / 'docs/data.md', 'json')[0])
    monkeypatch.chdir(tmp_path)
    _, path, *words = shlex.split(line)
    found = commands(script(Path(path).stem, *words, '--dry-run'))
    assert found and [parse_train(words) for words in found]


def test_there_are_commands_to_try():
    assert len(COMMANDS) > 20


def anchors(page):
    """The names that GitHub gives a page's headings."""
    headings = re.findall(r'^#+ (.*)$', re.sub(r'^```.*?^```$', '', page.read_text(), flags=re.MULTILINE | re.DOTALL),
                          flags=re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
        path, _, anchor = target.partition('#')
        if re.match(r'https?://', target):
            continue
        file = page.parent / path if path else page
        assert file.exists(), f'{page.name}: {target}'
        assert not anchor or anchor in anchors(file), f'{page.name}: {target}'


def test_the_readme_fits_on_its_pages():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 200


EXTENDING = ROOT / 'docs/extending.md'


def test_a_domain(tmp_path, monkeypatch):
    monkeypatch.setattr('mdil.datasets.domains.DOMAINS', domains := dict(DOMAINS))
    exec(code(EXTENDING, 'Layout('), {})
    for folder in ('image_2', 'semantic'):
        (tmp_path / 'kitti/train' / folder).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / 'kitti/train' / folder / 'a.png')
    assert 'kitti' in domains and len(find_split(get_domain('kitti'), tmp_path, 'train').pairs) == 1


def test_lists_divide_a_folder(tmp_path, capsys):
    page = ROOT / 'docs/data.md'
    recipe, = [block for block in blocks(page) if 'all.txt' in block]
    declared, = [block for block in blocks(page, 'json') if '"train": "train.txt"' in block and 'by_color' not in block]
    (tmp_path / 'domain.json').write_text(declared)
    for number in range(10):
        for folder, suffix, image in (('images', 'jpg', Image.new('RGB', (8, 8), (number, 0, 0))),
                                      ('labels', 'png', Image.new('L', (8, 8), number % 2))):
            (tmp_path / folder).mkdir(exist_ok=True)
            image.save(tmp_path / folder / f'a.{number} b.{suffix}')
    Image.new('RGB', (8, 8)).save(tmp_path / 'images/z.jpg')
    subprocess.run(['bash', '-ec', recipe], cwd=tmp_path, check=True)
    assert check.main(['--domains', 'my', '--data', f'my={tmp_path}', '--workers', '1']) == 0
    said = capsys.readouterr().out
    assert 'my train: 8 pairs, 0 errors' in said and 'my val: 2 pairs, 0 errors' in said


def test_a_loss_term():
    names = {}
    exec(code(EXTENDING, 'L2SP'), names)
    try:
        options = parse_train('--savedir S --method l2sp --domains CS BDD --state F --lambdac 3'.split())
        term = names['L2SP'](options)
        student, teacher = build_model([3, 4], 'l2sp'), build_model([3], 'l2sp')
    finally:
        del METHODS['l2sp']
    for part in (student, teacher):
        for parameter in part.shared_parameters():
            parameter.data.fill_(0.5)
    student.shared_parameters()[0].data.add_(1)
    step = StepLoss(student, teacher, [torch.ones(3), torch.ones(4)], [term])
    images, labels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 8, 8, dtype=torch.uint8)
    assert term.weight == 3
    total, mass = step(images, labels, 1, 'l2sp')[0].tolist()
    assert total / mass == student.shared_parameters()[0].numel() / 2


def test_a_backbone():
    names = {}
    exec(code(EXTENDING, 'SmallNet'), names)
    assert names['model'].num_classes == [20, 27]


def test_a_network_of_ones_own_is_trained(toy, tmp_path, capsys):
    block = code(ROOT / 'docs/networks.md', 'MyNet')
    assert sum(bool(line.strip()) for line in block.splitlines()) <= 30
    small = ['--network', 'mynet', '--data-root', str(toy), '--height', '32', '--num-workers', '0', '--num-epochs', '1',
             '--limit-batches', '1', '--class-weights', 'none', '--device', 'cpu', '--batch-size', '2']
    try:
        exec(block, {'__name__': 'mynet'})
        run(['train', *small, '--domains', 'CS', '--savedir', str(tmp_path / '1')])
        state = tmp_path / '1/model_best.pth.tar'
        run(['train', *small, '--domains', 'CS', 'IDD', '--state', str(state), '--savedir', str(tmp_path / '2'), '--method', 'adapters-only'])
        assert 'old domain cityscapes: 14 weight tensors' in capsys.readouterr().out
        assert run(['verify', str(state), str(tmp_path / '2/model_best.pth.tar')]) == 0
    finally:
        NETWORKS.pop('mynet', None)


def test_the_readme_builds_a_model():
    names = {'images': torch.zeros(1, 3, 16, 16)}
    exec(code(ROOT / 'README.md', 'build_model'), names)
    assert names['logits'].shape == (1, 20, 16, 16)


def test_the_declarations_of_the_data_page(tmp_path):
    found = []
    for text in blocks(ROOT / 'docs/data.md', 'json'):
        (tmp_path / 'domain.json').write_text(text)
        found.append(get_domain('cambridge', {'cambridge': tmp_path}))
    camvid, (layout,) = get_domain('camvid'), found[3].layouts
    assert (found[0].classes, found[0].colors) == (camvid.classes, camvid.colors)
    assert layout.label_kinds[0].values == {0: 2, 1: 0, 7: 0, 26: 1} and set(found[4].layouts[0].lists) == {'train', 'val'}


PYTHON = ROOT / 'docs/python.md'


@pytest.fixture
def at_work(tmp_path, monkeypatch, toy):
    """A working directory with the files that the page on Python speaks of."""
    for name in ('cityscapes', 'IDD'):
        pair = find_split(get_domain(name), toy, 'val').pairs[0]
        Image.open(pair.image).save(tmp_path / 'photo.png')
    statistics = {name: statistics_of([pair.image for pair in find_split(get_domain(name), toy, 'train').pairs], 0, name)
                  for name in ('cityscapes', 'IDD')}
    checkpoint.save({'version': 1, 'state_dict': build_model([20, 27]).state_dict(), 'method': 'mdil',
                     'domains': [{'name': 'cityscapes', 'classes': 20}, {'name': 'IDD', 'classes': 27}],
                     'options': {'height': 16, 'width': 32}, 'domain_statistics': statistics}, tmp_path / 'step3.pth')
    monkeypatch.chdir(tmp_path)


def test_a_network_used_from_python(at_work, capsys):
    names = {}
    exec(code(PYTHON, 'net.predict('), names)
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["['cityscapes', 'IDD']", 'IDD False'] and names['labels'].shape == (64, 128)


def test_a_loop_of_ones_own():
    names = {'batches': [(torch.rand(1, 3, 16, 32), torch.zeros(1, 16, 32, dtype=torch.uint8))]}
    exec(code(PYTHON, 'step_loss'), names)
    assert names['losses'].keys() == {'loss', 'ce', 'kd'} and names['losses']['kd'] == 0


def test_learning_from_python(at_work, toy, tmp_path, capsys):
    (tmp_path / 'DATA').symlink_to(toy)
    pairs = []
    for number in range(4):
        pairs.append((tmp_path / f'image{number}.png', tmp_path / f'label{number}.png'))
        for path in pairs[-1]:
            Image.fromarray(np.resize(np.uint8([0, 1]), (16, 32))).save(path)
    names = {'pairs': pairs}
    exec(code(PYTHON, 'mdil.learn('), names)
    assert names['net'].domains == ['cityscapes', 'village'] and capsys.readouterr().out.count("'cityscapes': {'loss'") == 1


def test_hub_and_published_network(at_work, capsys):
    names = {'checkout': str(ROOT)}
    exec(code(PYTHON, 'torch.hub'), names)
    assert names['net'].domains == ['cityscapes', 'IDD'] and names['model'].num_classes == [20, 27]
    exec(code(PYTHON, 'mdil.published'), names)
    assert capsys.readouterr().out.endswith('680\n') and names['logits'].shape == (1, 20, 64, 128)


def test_the_examples_of_docstrings(at_work, toy, tmp_path):
    (tmp_path / 'DATA').symlink_to(toy)
    names = {'mdil': mdil, 'torch': torch, 'numpy': np}
    runner, found = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS), []
    for member in (mdil.load, mdil.api.Network, mdil.step_loss, mdil.learn):
        for test in doctest.DocTestFinder().find(member, globs=names):
            test.globs = names      # what one example made, the next uses
            found += test.examples
            runner.run(test, clear_globs=False)
    assert runner.summarize().failed == 0 and len(found) > 10
