"""The notebooks run from top to bottom; the cell of settings alone leads them to other data."""
import json

import pytest

from tests.conftest import ROOT

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


def test_evaluation_notebook_on_toy_roads_then_on_given_checkpoints(tmp_path, monkeypatch, capsys):
    name = 'Evaluation_Notebook.ipynb'
    cells = execute(name, monkeypatch, OUT=str(tmp_path / 'a'), EPOCHS=1)
    shown = '\n'.join(outputs(cells, 'text/markdown'))
    assert '1 (cityscapes)' in shown and '2 (IDD)' in shown and 'traffic light' in shown
    assert len(outputs(cells, 'image/png')) == 3        # panels, two confusion matrices
    # The same code with other settings, without the cost of another kernel.
    states = [str(tmp_path / f'a/ours/step{step}/model_best.pth.tar') for step in ('1-cityscapes', '2-IDD')]
    book, names = read(name, {'OUT': str(tmp_path / 'b'), 'STATES': states[:1], 'DATA': str(tmp_path / 'a/data')}), {}
    for cell in book.cells:
        if cell.cell_type == 'code':
            exec(cell.source, names)
    first, second = (json.loads((tmp_path / place / 'results.json').read_text()) for place in 'ab')
    assert second['steps'] == [{**first['steps'][0], 'state': states[0]}]
    assert not (tmp_path / 'b/ours').exists() and '1 domain (20 classes)' in capsys.readouterr().out


def test_tsne_notebook_on_toy_roads(tmp_path, monkeypatch):
    cells = execute('Plot_Tsne_Notebook.ipynb', monkeypatch, OUT=str(tmp_path), EPOCHS=1,
                    CHOICES=['--perplexity', '10', '--points', '20'])
    shown = '\n'.join(outputs(cells, 'text/markdown'))
    assert '| ours |' in shown and '| fine-tune |' in shown
    assert len(outputs(cells, 'image/png')) == 1 and (tmp_path / 'tsne.csv').exists()
