"""The notebooks run from top to bottom; the cell of settings alone leads them to other data."""
import json

import pytest

from mdil.models import build_model
from mdil.models.layouts import published_keys
from tests.conftest import ROOT
from tests.fill import fill
from tests.test_checkpoints import published_file

nbformat = pytest.importorskip('nbformat')
nbclient = pytest.importorskip('nbclient')
pytest.importorskip('ipykernel')


def read(name, settings):
    """The notebook with other values in its cell of settings."""
    book = nbformat.read(ROOT / name, as_version=4)
    cells = [cell for cell in book.cells if 'settings' in cell.metadata.get('tags', [])]
    assert len(cells) == 1 and not any(cell.get('outputs') for cell in book.cells)
    cells[0].source += ''.join(f'\n{key} = {value!r}' for key, value in settings.items())
    return book


def execute(name, monkeypatch, **settings):
    """The notebook's cells after a run in a kernel."""
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    book = read(name, settings)
    nbclient.NotebookClient(book, timeout=250, resources={'metadata': {'path': str(ROOT)}}).execute()
    return book.cells


def outputs(cells, kind):
    """All that the cells show of a MIME type."""
    found = [output.get('data', {}) for cell in cells for output in cell.get('outputs', [])]
    return [data[kind] for data in found if kind in data]


def run_here(name, **settings):
    """The names that the notebook's cells leave, run in this process."""
    names = {}
    for cell in read(name, settings).cells:
        if cell.cell_type == 'code':
            exec(cell.source, names)
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


def test_evaluation_notebook_on_toy_roads_then_on_given_checkpoints(tmp_path, monkeypatch, capsys):
    name = 'Evaluation_Notebook.ipynb'
    cells = execute(name, monkeypatch, OUT=str(tmp_path / 'a'), EPOCHS=1)
    shown = '\n'.join(outputs(cells, 'text/markdown'))
    assert '1 (cityscapes)' in shown and '2 (IDD)' in shown and 'traffic light' in shown
    assert len(outputs(cells, 'image/png')) == 3        # panels, two confusion matrices
    assert all(f'| {method} |' in shown for method in ('mdil', 'fine-tune', 'single-task'))
    # The same code with other settings, without the cost of another kernel.
    states = [str(tmp_path / f'a/mdil/step{step}/model_best.pth.tar') for step in ('1-cityscapes', '2-IDD')]
    run_here(name, OUT=str(tmp_path / 'b'), STATES=states[:1], DATA=str(tmp_path / 'a/data'))
    # A file of one domain that its record names needs no DOMAINS.
    first, second = (json.loads((tmp_path / place / 'results.json').read_text()) for place in 'ab')
    assert second['steps'] == [{**first['steps'][0], 'state': states[0]}]
    assert not (tmp_path / 'b/mdil').exists() and '1 domain (20 classes)' in capsys.readouterr().out


def test_tsne_notebook_on_toy_roads(tmp_path, monkeypatch):
    cells = execute('Plot_Tsne_Notebook.ipynb', monkeypatch, OUT=str(tmp_path), EPOCHS=1,
                    CHOICES=['--perplexity', '10', '--points', '20'])
    shown = '\n'.join(outputs(cells, 'text/markdown'))
    assert '| mdil |' in shown and '| fine-tune |' in shown
    assert len(outputs(cells, 'image/png')) == 1 and (tmp_path / 'tsne.csv').exists()
