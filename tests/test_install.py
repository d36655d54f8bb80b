"""One name, `mdil`: installed, editable and in a checkout, next to other packages called models, datasets and utils."""
import ast
import json
import os
import runpy
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import mdil.models
from mdil.__main__ import TOOLS
from mdil.utils.errors import UserError, run_main
from tests.conftest import ROOT, run_script

FOREIGN = ('models', 'datasets', 'utils')
# Imports go from a level to those below it.
LEVELS = [('utils',), ('datasets', 'losses'), ('models',), ('training',), ('evaluation',), ('train', 'eval', 'predict'),
          ('api', 'published'), ('learning', ''), ('__main__', 'report', 'plot_tsne', 'benchmarks', 'hubconf', 'examples')]
LOAD_ALL = ('import importlib, sys, mdil.__main__ as main\n'
            'for module, _ in main.TOOLS.values(): assert callable(importlib.import_module(module).main), module\n'
            'assert not {"visdom", "matplotlib", "sklearn", "av", "torchvision"} & sys.modules.keys()\n'
            'importlib.import_module("mdil.evaluation.report").TEMPLATES.get_template("report.html")\n'
            'import mdil.models; assert callable(mdil.load) and callable(mdil.learn) and mdil.published.Net(20)\n'
            'print(mdil.models.__file__, sum(p.numel() for p in mdil.models.build_model([20, 20]).parameters()))')


def run(folder, *command, paths=()):
    """Standard output of this Python (or of a command), run in `folder` with `paths` among its import paths."""
    command = command if isinstance(command[0], Path) else (sys.executable, *command)
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, timeout=280,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(map(str, paths))})
    assert done.returncode == 0, f'exit {done.returncode}\n{done.stdout}\n{done.stderr}'
    return done.stdout


def train_a_batch(folder, toy, paths):
    """Learns a step of one batch in `folder`, by the command line."""
    run(folder, '-m', 'mdil', 'train', '--domains', 'cityscapes', '--savedir', 'run', '--data-root', toy,
        '--height', '32', '--num-epochs', '1', '--batch-size', '2', '--limit-batches', '1', '--num-workers', '1',
        '--device', 'cpu', '--class-weights', 'computed', paths=paths)
    return json.loads((folder / 'run/metrics.jsonl').read_text()), json.loads((folder / 'run/opts.json').read_text())


@pytest.fixture
def foreign(tmp_path):
    """A folder with packages of other projects, called as our folders are."""
    for name in FOREIGN:
        (tmp_path / 'foreign' / name).mkdir(parents=True)
        (tmp_path / 'foreign' / name / '__init__.py').write_text("foreign = True\n")
    return tmp_path / 'foreign'


@pytest.fixture
def elsewhere(tmp_path):
    """A working directory that has nothing of the project."""
    (tmp_path / 'elsewhere').mkdir()
    return tmp_path / 'elsewhere'


def test_the_wheel_trains_next_to_foreign_packages(tmp_path, foreign, elsewhere, toy):
    pytest.importorskip('hatchling', reason='hatchling builds the wheel')
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '--quiet']
    subprocess.run([*pip, 'wheel', '--no-build-isolation', '--no-deps', '-w', tmp_path / 'dist', ROOT], check=True)
    wheel, = (tmp_path / 'dist').iterdir()
    subprocess.run([*pip, 'install', '--no-deps', '--no-index', '--target', foreign, wheel], check=True)
    assert sorted(path.name for path in foreign.iterdir() if path.suffix != '.dist-info') == sorted(
        ['bin', 'mdil', *FOREIGN])
    code = f'import models, datasets, utils; assert models.foreign and datasets.foreign and utils.foreign\n{LOAD_ALL}'
    assert run(elsewhere, '-c', code, paths=[foreign]) == f'{foreign}/mdil/models/__init__.py 2871844\n'
    metrics, options = train_a_batch(elsewhere, toy, paths=[foreign])
    assert metrics['epoch'] == 1 and options['versions']['git'] is None


def test_an_editable_installation_shows_mdil_alone(tmp_path, foreign, elsewhere):
    pytest.importorskip('hatchling', reason='hatchling makes the installation')
    pytest.importorskip('editables', reason='editables makes the installation')
    venv.create(tmp_path / 'venv')
    python = tmp_path / 'venv/bin/python'
    packages, = (tmp_path / 'venv').glob('lib/python*/site-packages')
    (packages / 'outer.pth').write_text('\n'.join(site.getsitepackages()))       # torch, pip and the rest
    run(elsewhere, python, '-m', 'pip', '--disable-pip-version-check', '--quiet', 'install', '--no-build-isolation',
        '--no-deps', '--no-index', '-e', ROOT)
    assert 'create-labels' in run(elsewhere, tmp_path / 'venv/bin/mdil')
    assert run(elsewhere, python, '-c', LOAD_ALL, paths=[foreign]).startswith(f'{ROOT}/models/__init__.py')
    alone = 'import importlib.util as u; print([u.find_spec(name) for name in ("models", "losses", "training")])'
    assert run(elsewhere, python, '-c', alone) == '[None, None, None]\n'


def test_a_checkout_works_next_to_foreign_packages(foreign, elsewhere):
    code = f'import models; assert models.foreign\n{LOAD_ALL}'
    assert run(elsewhere, '-c', code, paths=[foreign, ROOT]) == f'{ROOT}/models/__init__.py 2871844\n'
    # The other way round, its folders come first under their own names.
    code = 'import importlib.util as u; print(u.find_spec("models").origin, u.find_spec("mdil.models").origin)'
    assert run(elsewhere, '-c', code, paths=[ROOT, foreign]) == f'{ROOT}/models/__init__.py {ROOT}/models/__init__.py\n'


def test_a_checkout_has_its_folders_as_names_too():
    from models import build_model
    assert build_model is mdil.models.build_model


def test_python_m_mdil_lists_and_runs_tools():
    listed = run_script('-m', 'mdil').stdout
    assert all(f'  {name} ' in listed and about in listed for name, (_, about) in TOOLS.items())
    with pytest.raises(UserError, match="^'trian' is not a tool; choose from train, eval"):
        mdil.__main__.run(['trian'])
    with pytest.raises(UserError, match='^none does not exist$'):
        mdil.__main__.run(['describe', 'none'])


@pytest.mark.parametrize('old, tool', [
    ('report.py', 'report'), ('plot_tsne.py', 'tsne'), ('utils.compare', 'compare'), ('utils.describe', 'describe'),
    ('utils.export', 'export'), ('datasets.toy_roads', 'toy-roads'), ('datasets.class_weights', 'class-weights'),
    ('datasets.check', 'check'), ('datasets.create_labels', 'create-labels'), ('train.py', 'train'),
    ('eval.py', 'eval')])
@pytest.mark.filterwarnings('ignore:.*found in sys.modules:RuntimeWarning')
def test_old_commands_are_the_tools(old, tool, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        mdil.__main__.run([tool, '--help'])
    help_text = capsys.readouterr().out
    monkeypatch.setattr(sys, 'argv', [old, '--help'])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(ROOT / old, run_name='__main__') if old.endswith('.py') else runpy.run_module(old, run_name='__main__')
    assert end.value.code == 0 and capsys.readouterr().out == help_text != ''


@pytest.mark.parametrize('name, package', [('matplotlib.figure', 'matplotlib'), ('sklearn', 'scikit-learn')])
def test_a_missing_optional_package_is_one_line(name, package, capsys):
    def lacking():
        raise ModuleNotFoundError(name=name)
    with pytest.raises(SystemExit) as end:
        run_main(lacking)
    assert end.value.code == 2 and capsys.readouterr().err == f'error: {package} is missing: pip install {package}\n'


def test_what_is_required_is_said_once():
    """pyproject.toml names what requirements.txt does, with the same bounds."""
    tomllib = pytest.importorskip('tomllib')
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    named = {*project['dependencies'], *sum(project['optional-dependencies'].values(), [])}
    lines = [line for name in ('requirements.txt', 'requirements-dev.txt')
             for line in (ROOT / name).read_text().splitlines() if line[0] not in '#-']
    assert named <= set(lines) and set((ROOT / 'requirements.txt').read_text().splitlines()) & set(lines) <= named


def ours(path):
    """Parts below `mdil` that a source file imports, as (name, line number)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split('.')[0] == 'mdil':
            inside = node.module.split('.')[1:2] or [name.name for name in node.names]
            yield from ((name, node.lineno) for name in inside)
        elif isinstance(node, ast.Import):
            yield from ((name.name.partition('.')[2].split('.')[0], node.lineno) for name in node.names
                        if name.name.startswith('mdil'))


def test_imports_go_downwards():
    """No folder imports one above it or at its level."""
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    files = [path for path in [*ROOT.glob('*.py'), *ROOT.glob('*/*.py'), *ROOT.glob('*/*/*.py')]
             if path.relative_to(ROOT).parts[0] not in ('tests', '.venv', 'docs', 'hatch_build.py')]
    seen = set()
    for path in files:
        parts = path.relative_to(ROOT).parts
        own = Path(parts[1 if parts[0] == 'mdil' else 0]).stem
        for name, line in ours(path):
            seen.add((own, name))
            assert own == name or level[name] < level[own], f'{path}:{line} imports {name}, which is not below {own}'
    assert ('evaluation', 'training') in seen and ('models', 'utils') in seen
