"""The notebooks run from top to bottom; the cell of settings alone leads them to other data."""
import json

import pytest

from mdil.datasets.toy import roads
from mdil.models import build_model
from mdil.models.layouts import published_keys
from tests.conftest import ROOT
from tests.fill import fill
from tests.test_checkpoints import published_file

pytestmark = pytest.mark.usefixtures('shallow_module')

interactiveshell = pytest.importorskip('IPython.core.interactiveshell')
TINY = {'HEIGHT': 32, 'WIDTH': 64, 'EPOCHS': 1}


def code(name, settings):
    """The code of the notebook's cells with other values in its cell of settings."""
    cells = json.loads((ROOT / name).read_text())['cells']
    sources = {number: ''.join(cell['source']) for number, cell in enumerate(cells) if cell['cell_type'] == 'code'}
    number, = [number for number, cell in enumerate(cells) if 'settings' in cell['metadata'].get('tags', [])]
    assert not any(cell.get('outputs') for cell in cells)
    sources[number] += ''.join(f'\n{key} = {value!r}' for key, value in settings.items())
    return list(sources.values())


@pytest.fixture
def shell(monkeypatch):
    """What a kernel runs cells with."""
    monkeypatch.delenv('VIRTUAL_ENV', raising=False)        # IPython would add the packages of that environment for good
    made = interactiveshell.InteractiveShell.instance()
    made.history_manager.enabled = False
    yield made
    interactiveshell.InteractiveShell.clear_instance()


@pytest.fixture
def few_roads(monkeypatch):
    """Has the notebooks draw 6 training images instead of 30."""
    draw = roads.write_toy_roads
    monkeypatch.setattr(roads, 'write_toy_roads', lambda root, train, **more: draw(root, train=train // 5, **more))


def execute(shell, name, **settings):
    """What the notebook's cells show: [{MIME type: data}]."""
    from IPython.utils.capture import capture_output
    shown = []
    for source in code(name, settings):
        with shell.display_trap, capture_output(stdout=False, stderr=False) as captured:
            shell.run_cell(source).raise_error()
        shown += [output.data for output in captured.outputs]
    return shown


def outputs(shown, kind):
    """All that is shown of a MIME type."""
    return [data[kind] for data in shown if kind in data]


def run_here(name, **settings):
    """The names that the notebook's cells leave, without IPython."""
    names = {}
    for source in code(name, settings):
        exec(source, names)
    return names


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    """Published files, which name no domains: the adapter model after steps 1 and 2, and a single-task network."""
    root, files = tmp_path_factory.mktemp('published'), {}
    for name, classes, method in (('one', [20], 'mdil'), ('two', [20, 27], 'mdil'), ('single', [27], 'single-task')):
        adapter = 'parallel' if method == 'mdil' else None
        keys = published_keys(fill(build_model(classes, method)).state_dict(), classes, adapter)
        files[name] = str(published_file(root / f'{name}.pth.tar', keys))
    return files


def test_evaluation_notebook_takes_published_files(toy, tmp_path, published):
    names = run_here('Evaluation_Notebook.ipynb', OUT=str(tmp_path), DATA=str(toy), STATES=[published['one'], published['two']],
                     DOMAINS=['cityscapes', 'IDD'], SINGLE_TASK={'IDD': published['single']})
    found = json.loads((tmp_path / 'results.json').read_text())
    assert [list(step['domains']) for step in found['steps']] == [['cityscapes'], ['cityscapes', 'IDD']]
    assert [row[0] for row in names['rows']] == ['mdil', 'single-task'] and list(names['models']) == ['step 1', 'step 2']


def test_tsne_notebook_takes_published_files_and_every_pixel(toy, tmp_path, published):
    names = run_here('Plot_Tsne_Notebook.ipynb', OUT=str(tmp_path), DATA=str(toy), STATES=[published['one'], published['two']],
                     DOMAINS=['cityscapes', 'IDD'], CHOICES=['--perplexity', '10', '--points', '8192', '--images', '1'])
    classes = names['pixels'].classes
    assert list(names['results']) == ['mdil'] and len(names['pixels'].cells) == len(set(names['pixels'].cells.tolist()))
    assert 64 < len(classes) <= 8 * 16 and len(set(names['pixels'].images)) == 1     # all of 8 x 16 but for void


def test_evaluation_notebook_on_toy_roads_then_on_given_checkpoints(shell, few_roads, tmp_path, capsys):
    name = 'Evaluation_Notebook.ipynb'
    cells = execute(shell, name, OUT=str(tmp_path / 'a'), **TINY)
    shown = '\n'.join(outputs(cells, 'text/markdown'))
    assert '1 (cityscapes)' in shown and '2 (IDD)' in shown and 'traffic light' in shown
    assert len(outputs(cells, 'image/png')) == 3        # panels, two confusion matrices
    assert all(f'| {method} |' in shown for method in ('mdil', 'fine-tune', 'single-task'))
    states = [str(tmp_path / f'a/mdil/step{step}/model_best.pth.tar') for step in ('1-cityscapes', '2-IDD')]
    run_here(name, OUT=str(tmp_path / 'b'), STATES=states[:1], DATA=str(tmp_path / 'a/data'), **TINY)
    # A file of one domain that its record names needs no DOMAINS.
    first, second = (json.loads((tmp_path / place / 'results.json').read_text()) for place in 'ab')
    assert second['steps'] == [{**first['steps'][0], 'state': states[0]}]
    assert not (tmp_path / 'b/mdil').exists() and '1 domain (20 classes)' in capsys.readouterr().out


def test_tsne_notebook_on_toy_roads(shell, few_roads, tmp_path):
    cells = execute(shell, 'Plot_Tsne_Notebook.ipynb', OUT=str(tmp_path), **TINY, CHOICES=['--perplexity', '10', '--points', '20'])
    shown = '\n'.join(outputs(cells, 'text/markdown'))
    assert '| mdil |' in shown and '| fine-tune |' in shown
    assert len(outputs(cells, 'image/png')) == 1 and (tmp_path / 'tsne.csv').exists()
