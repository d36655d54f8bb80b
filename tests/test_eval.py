"""eval.py and the comparison: figures against independent ones, formats, resolutions, label spaces, seeds."""
import contextlib
import csv
import io
import json
import os
import re
import shutil
import statistics

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score

from mdil import eval as evaluation
from mdil.datasets import DOMAINS, common, get_domain
from mdil.datasets.pairs import find_split
from mdil.evaluation import compare, pictures, tables
from mdil.evaluation.epochs import training_of
from mdil.models import build_model, checkpoint
from mdil.utils.errors import UserError

pytestmark = pytest.mark.usefixtures('shallow_module')

COUNTS = {'cityscapes': 20, 'BDD': 20, 'IDD': 27}
# Label ids of Cityscapes in each of the common classes.
COMMON_IDS = ((7, 9), (8, 10, 22), (24, 25), range(26, 34), (12, 13, 14, 17, 18, 19, 20), (11, 15, 16, 21), (23,))


def save(path, model, names, method='mdil'):
    checkpoint.save({'version': 1, 'epoch': 1, 'state_dict': model.state_dict(), 'best_acc': 0.0, 'method': method,
                     'domains': [{'name': name, 'classes': COUNTS[name]} for name in names]}, path)
    return path


@pytest.fixture(scope='module')
def states(tmp_path_factory):
    """Checkpoints of the three steps of an untrained network whose decoders differ."""
    folder, names, paths = tmp_path_factory.mktemp('states'), list(COUNTS), []
    torch.manual_seed(0)
    for count in (1, 2, 3):
        model = build_model([COUNTS[name] for name in names[:count]])
        paths.append(save(folder / f'{count}.pth', model.eval(), names[:count]))
    return paths


def run(toy, *arguments):
    evaluation.main(['--data-root', str(toy), '--height', '32', '--num-workers', '0', '--device', 'cpu',
                     *map(str, arguments)])


def evaluate(toy, folder, *arguments):
    """The JSON that eval.py writes; NaN is refused as JSON does."""
    run(toy, '--json', folder / 'r.json', *arguments)
    return json.loads((folder / 'r.json').read_text(), parse_constant=lambda name: pytest.fail(f'{name} in JSON'))


@pytest.fixture(scope='module')
def sequence(toy, states, tmp_path_factory):
    """(folder of the files, contents of the JSON, what is shown) of the sequence with all options of scoring."""
    folder = tmp_path_factory.mktemp('sequence')
    files = [part for kind in ('csv', 'markdown', 'latex') for part in (f'--{kind}', folder / f'r.{kind}')]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        found = evaluate(toy, folder, '--state', *states, '--cross-heads', '--common-classes', '--per-class',
                         '--single-task', 'CS=50', 'BDD=40', 'IDD=30', *files)
    return folder, found, shown.getvalue()


def maps(toy, state, number, images_of, native=False):
    """(truth, answer) of all validation images, flat: label file values, and argmax of the logits at the label's size.

    An implementation of its own: Pillow for the images, one image at a time.
    """
    model = checkpoint.load_network(checkpoint.read_checkpoint(state)).eval()
    truth, answer = [], []
    for pair in find_split(get_domain(images_of), toy, 'val').pairs:
        pixels = np.asarray(Image.open(pair.image).convert('RGB').resize((64, 32), Image.BILINEAR))
        label = Image.open(pair.label)
        label = np.asarray(label if native else label.resize((64, 32), Image.NEAREST))
        with torch.inference_mode():
            logits = model(torch.tensor(pixels).permute(2, 0, 1)[None] / 255, number)
            if native:
                logits = torch.nn.functional.interpolate(logits, label.shape, mode='bilinear')
        truth.append(label.ravel())
        answer.append(logits[0].argmax(dim=0).numpy().ravel())
    return np.concatenate(truth), np.concatenate(answer)


def want(truth, answer, classes, void):
    """(mIoU, accuracy) in percent from scikit-learn over the pixels whose truth is not void."""
    truth, answer = truth[truth != void], answer[truth != void]
    present = [c for c in range(classes) if (truth == c).any() or (answer == c).any()]
    return (100 * jaccard_score(truth, answer, labels=present, average='macro', zero_division=0),
            100 * accuracy_score(truth, answer))


def figures(entry):
    return entry['miou'], entry['accuracy']


def test_published_protocol_equals_scikit_learn(toy, states, sequence):
    truth, answer = maps(toy, states[2], 2, 'IDD')
    assert figures(sequence[1]['domains']['IDD']) == pytest.approx(want(truth, answer, 26, 255))
    assert sequence[1]['protocol']['resolution'] == 'published'


def test_the_size_is_that_of_the_training_unless_stated(toy, states, tmp_path, capsys):
    for number, (path, height) in enumerate(zip(states, (32, 16)), 1):
        checkpoint.save({**checkpoint.read(path), 'options': {'height': height, 'width': 64}}, tmp_path / f'{number}.pth')
    words = ['--data-root', str(toy), '--num-workers', '0', '--device', 'cpu', '--limit-batches', '1', '--state']
    evaluation.main([*words, str(tmp_path / '1.pth'), '--json', str(tmp_path / 'r.json')])
    protocol = json.loads((tmp_path / 'r.json').read_text())['protocol']
    assert (protocol['height'], protocol['width']) == (32, 64) and 'at 64x32, to which' in capsys.readouterr().out
    with pytest.raises(UserError, match='different sizes .*1.pth 64x32, .*2.pth 64x16.; choose one for all with --height'):
        evaluation.main([*words, str(tmp_path / '1.pth'), str(tmp_path / '2.pth')])
    run(toy, '--state', tmp_path / '1.pth', tmp_path / '2.pth', '--limit-batches', 1)
    with pytest.raises(UserError, match='--width is given without --height'):
        evaluation.main([*words, str(tmp_path / '1.pth'), '--width', '64'])
    (tmp_path / 'notes').write_text('mine')
    with pytest.raises(UserError, match='notes exists; name another file, or replace it with --overwrite'):
        evaluation.main([*words, str(tmp_path / '1.pth'), '--json', str(tmp_path / 'notes')])
    assert (tmp_path / 'notes').read_text() == 'mine'


@pytest.fixture(scope='module')
def uneven(toy, tmp_path_factory):
    """BDD images and labels of the toy roads, one of them of twice the size."""
    root = tmp_path_factory.mktemp('uneven')
    shutil.copytree(toy / 'bdd100k', root / 'bdd100k')
    pair = find_split(DOMAINS['BDD'], root, 'val').pairs[1]
    for path in (pair.image, pair.label):
        image = Image.open(path)
        image.resize((2 * image.width, 2 * image.height), Image.NEAREST).save(path)
    return root


def bdd_only(folder):
    """Writes a checkpoint of one step that knows BDD alone; returns its path."""
    torch.manual_seed(5)
    return save(folder / 'bdd.pth', build_model([20]).eval(), ['BDD'])


def test_native_resolution_scores_at_each_labels_own_size(uneven, tmp_path, capsys):
    state = bdd_only(tmp_path)
    truth, answer = maps(uneven, state, 0, 'BDD', native=True)
    native = evaluate(uneven, tmp_path, '--state', state, '--resolution', 'native', '--batch-size', 3)
    text = capsys.readouterr().out
    assert len(truth) == 3 * 64 * 128 + 128 * 256
    assert figures(native['domains']['BDD']) == pytest.approx(want(truth, answer, 19, 255))
    assert "at each label's own size (native): logits of the images resized to 64x32" in ' '.join(text.split())
    published = evaluate(uneven, tmp_path, '--state', state, '--overwrite')
    said = ' '.join(capsys.readouterr().out.split())
    assert 'at 64x32, to which images and labels are resized' in said and 'Method mdil, torch ' in said
    assert published['domains']['BDD']['miou'] != pytest.approx(native['domains']['BDD']['miou'])
    assert native['protocol'] == {**published['protocol'], 'resolution': 'native', 'batch_size': 3}


def test_cross_heads_run_each_head_on_the_domains_of_its_classes(toy, states, sequence):
    heads = sequence[1]['cross_heads']
    truth, answer = maps(toy, states[2], 0, 'BDD')
    assert figures(heads['cityscapes']['BDD']) == pytest.approx(want(truth, answer, 19, 255))
    assert heads['BDD']['BDD']['miou'] == sequence[1]['domains']['BDD']['miou']
    assert heads['IDD']['BDD']['miou'] is heads['BDD']['IDD']['miou'] is None
    truth, answer = maps(toy, states[2], 2, 'BDD')
    truth, answer = (np.array(common.to_common(DOMAINS[name]) + [7] * 236)[part[truth < 19]]
                     for name, part in (('BDD', truth), ('IDD', answer)))
    assert figures(heads['IDD']['BDD']['common']) == pytest.approx(want(truth, answer, 7, 7))


def test_the_common_classes_are_the_known_table():
    values = common.with_finer_labels(DOMAINS['cityscapes']).layouts[0].label_kinds[0].values
    space = common.to_common(DOMAINS['cityscapes']) + list(range(common.VOID))
    got = {identity: space[index] for identity, index in values.items()}
    assert got == {identity: next((c for c, ids in enumerate(COMMON_IDS) if identity in ids), 7) for identity in range(34)}
    assert common.to_common(DOMAINS['camvid']) == [6, 5, 4, 0, 1, 5, 4, 4, 3, 2, 2, 7]
    assert common.to_common(DOMAINS['idd-lite']) == list(range(8))
    assert common.to_common(DOMAINS['IDD']) == [0, 0, 1, 1, 2, 2, *[3] * 7, *[4] * 9, 5, 5, 5, 6, 7]
    assert common.to_common(DOMAINS['BDD']) == common.to_common(DOMAINS['cityscapes'])


def test_common_classes_score_all_label_ids_that_have_a_place(toy, states, tmp_path):
    """Parking and caravans are void among the own classes."""
    shutil.copytree(toy / 'cityscapes', tmp_path / 'cityscapes')
    for pair in find_split(DOMAINS['cityscapes'], tmp_path, 'val').pairs:
        label = np.array(Image.open(pair.label))
        label[20:40, :50], label[40:60, 60:] = 9, 29
        Image.fromarray(label).save(pair.label)
    entry = evaluate(tmp_path, tmp_path, '--state', states[0], '--common-classes')['domains']['cityscapes']
    truth, answer = maps(tmp_path, states[0], 0, 'cityscapes')
    place = np.full(256, 7)
    for index, ids in enumerate(COMMON_IDS):
        place[list(ids)] = index
    values = DOMAINS['cityscapes'].layouts[0].label_kinds[1].values
    trained = {index: place[identity] for identity, index in values.items() if index < 19}
    common_answer = np.array([trained.get(index, 7) for index in range(20)])[answer]
    assert figures(entry['common']) == pytest.approx(want(place[truth], common_answer, 7, 7))
    assert list(entry['common']['iou']) == list(common.CLASSES)
    own = np.array([values.get(identity, 19) for identity in range(256)])[truth]
    assert figures(entry) == pytest.approx(want(own, answer, 19, 19))


def test_common_classes_leave_the_own_figures_as_they_are(toy, states, sequence, tmp_path):
    plainly = evaluate(toy, tmp_path, '--state', states[2])
    assert 'cross_heads' not in plainly and 'common_summary' not in plainly
    for name, entry in plainly['domains'].items():
        assert list(entry) == ['miou', 'accuracy', 'iou', 'loss']
        assert entry == {key: sequence[1]['domains'][name][key] for key in entry}


def test_an_own_domain_without_a_place_in_the_common_classes_is_refused(tmp_path):
    (tmp_path / 'domain.json').write_text(json.dumps({'images': 'a', 'labels': 'b', 'classes': [
        {'name': 'road', 'color': [1, 2, 3]}, {'name': 'lava', 'color': [9, 9, 9]}]}))
    COUNTS['mars'] = 3
    state = save(tmp_path / 'mars.pth', build_model([3]), ['mars'])
    with pytest.raises(UserError, match="domain 'mars' has no mapping to the common classes: 'lava' is") as error:
        run(tmp_path, '--state', state, '--data', f'mars={tmp_path}', '--common-classes')
    assert '\n' not in str(error.value)


def test_summary_of_the_sequence(sequence):
    results = sequence[1]
    steps = [{name: entry['miou'] for name, entry in step['domains'].items()} for step in results['steps']]
    summary = results['summary']
    assert summary['forgetting'] == pytest.approx({
        'cityscapes': max(steps[0]['cityscapes'], steps[1]['cityscapes']) - steps[2]['cityscapes'],
        'BDD': steps[1]['BDD'] - steps[2]['BDD']})
    assert summary['backward_transfer'] == pytest.approx(
        (steps[2]['cityscapes'] - steps[0]['cityscapes'] + steps[2]['BDD'] - steps[1]['BDD']) / 2)
    assert summary['forward_transfer'] == pytest.approx((steps[1]['BDD'] - 40 + steps[2]['IDD'] - 30) / 2)
    single = {'cityscapes': 50, 'BDD': 40, 'IDD': 30}
    assert summary['delta_m'] == pytest.approx(
        sum(100 * (steps[2][name] - value) / value for name, value in single.items()) / 3)
    # Results stated by number are of the domains' own classes.
    assert results['common_summary']['single_task'] == {} and results['common_summary']['delta_m'] is None


def test_csv_holds_every_figure(sequence):
    folder, results, _ = sequence
    with open(folder / 'r.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ['step', 'head', 'domain', 'classes', 'class', 'metric', 'value']
    found = {tuple(row.values())[:6]: float(row['value']) for row in rows}
    assert len(found) == len(rows)
    for number, step in enumerate(results['steps'], 1):
        for name, entry in step['domains'].items():
            for space, part in (('own', entry), ('common', entry['common'])):
                place = (str(number), name, name, space)
                assert found.pop((*place, '', 'miou')) == part['miou']
                assert found.pop((*place, '', 'accuracy')) == part['accuracy']
                for label, iou in part['iou'].items():
                    assert iou is None or found.pop((*place, label, 'iou')) == 100 * iou
            assert found.pop((str(number), name, name, 'own', '', 'loss')) == entry['loss']
    assert found.pop(('3', 'cityscapes', 'BDD', 'own', '', 'miou')) == results['cross_heads']['cityscapes']['BDD']['miou']
    assert found.pop(('3', '', 'BDD', 'own', '', 'forgetting')) == results['summary']['forgetting']['BDD']
    assert found.pop(('3', '', '', 'own', '', 'delta_m')) == results['summary']['delta_m']
    assert {key[5] for key in found} <= {'miou', 'accuracy', 'iou', 'forgetting', 'single_task', 'backward_transfer',
                                         'forward_transfer'}


def test_markdown_and_latex_hold_the_tables(sequence):
    folder, results, _ = sequence
    miou = tables.number(results['domains']['IDD']['miou'])
    text = (folder / 'r.markdown').read_text()
    assert f'| 3 (IDD) | {tables.number(results["domains"]["cityscapes"]["miou"])} |' in text and f'| {miou} |' in text
    latex = (folder / 'r.latex').read_text()
    environments = re.findall(r'\\(begin|end)\{(\w+\*?)\}', latex)
    assert environments == [('begin', 'table'), ('begin', 'tabular'), ('end', 'tabular'), ('end', 'table')] * (
        len(environments) // 4) and environments
    for table in latex.split(r'\begin{tabular}')[1:]:
        columns = len(re.match(r'\{(l r*|lr*)\}', table).group(1))
        body = table.split(r'\toprule')[1].split(r'\bottomrule')[0]
        rows = [line for line in body.splitlines() if line.endswith(r'\\')]
        assert len(rows) > 1 and all(line.count(' & ') == columns - 1 for line in rows) and r'\midrule' in body
    assert latex.count(r'\caption') == latex.count(r'\label') == latex.count(r'\begin{table}')
    assert 'to which images and labels are resized' in latex and 'revision' in latex and r'$\Delta_m$\%' in latex
    assert not re.search(r'(?<!\\)[%_#](?! \\usepackage)', re.sub(r'\\label\{[^}]*\}|\$.*?\$', '', latex).split('\n', 1)[1])


def test_latex_escapes_what_it_must():
    assert tables.tex('a_b & 5% {x} #1 ~^\\') == (r'a\_b \& 5\% \{x\} \#1 \textasciitilde{}\textasciicircum{}'
                                                  r'\textbackslash{}')
    assert tables.tex('[a]') == '{[}a]' and tables.tex('*') == '{*}'     # \\ takes both for its own at a row's start
    assert tables.tex('-3.25') == '$-3.25$' and tables.tex('3.25') == '3.25' and tables.tex('-') == '--'
    assert tables.tex('1.50 +- 0.25') == r'$1.50 \pm 0.25$'


def test_terminal_stays_within_80_columns_and_says_how_void_counts(sequence):
    text = sequence[2]
    assert max(map(len, text.splitlines())) <= 80
    assert 'Void pixels do not count' in text and 'pixel accuracy' in text and 'split val' in text
    for name in ('cityscapes', 'BDD', 'IDD', 'autorickshaw', 'obs-str-bar-fallback', 'traffic light', 'living things'):
        assert name in text


def test_many_columns_go_below_each_other():
    names = [f'a-domain-with-a-long-name-{number}-{"x" * 40 if number == 3 else ""}' for number in range(9)]
    header, rows = tables.step_rows([{name: 1.5 + number for number, name in enumerate(names[:count])}
                                     for count in range(1, 10)])
    text = tables.fitted(header, [rows])
    assert max(map(len, text.splitlines())) <= 80
    assert text.count('1 (a-domain') == text.count('mIoU after step') > 1 and '9.50' in text
    assert [line.split()[-1] for line in text.splitlines() if line.startswith('9 (')][-1] == '9.50'


def test_long_cells_are_wrapped_so_that_nothing_is_lost():
    name, score = 'adapters-only --lr 1e-3 --first --lr 1e-3 --no-dropout', '1.54 +- 0.01 (p 0.002, better)'
    text = tables.fitted(['row', 'mIoU'], [[[name, score], [f'{name}, estimated', '1']]])
    assert [line.split('   ')[0] for line in text.splitlines()[2:]] == [
        'adapters-only --lr 1e-3', '  --first --lr 1e-3', '  --no-dropout',
        'adapters-only --lr 1e-3', '  --first --lr 1e-3', '  --no-dropout, estimated']
    assert '1.54 +- 0.01 (p 0.002,' in text and 'better)' in text


def test_a_nameless_single_task_file_is_not_taken_for_the_first_domain(toy, tmp_path):
    torch.manual_seed(5)
    for name, counts in (('two', [20, 20]), ('bdd', [20])):
        torch.save({'state_dict': build_model(counts).state_dict()}, tmp_path / name)
    files = '--state', tmp_path / 'two', '--single-task', tmp_path / 'bdd', '--domains'
    with pytest.raises(UserError, match='--single-task .*bdd does not name its domain; evaluate it alone'):
        evaluate(toy, tmp_path, *files, 'CS', 'BDD')


def test_method_is_that_of_state_not_of_single_task(toy, states, tmp_path):
    plain = save(tmp_path / 'plain', build_model([20], 'single-task'), ['BDD'], 'single-task')
    results = evaluate(toy, tmp_path, '--state', states[1], '--method', 'mdil', '--single-task', 'CS=50', plain, '--limit-batches', '1')
    assert set(results['summary']['single_task']) == {'cityscapes', 'BDD'}
    with pytest.raises(UserError, match='not a network of --method multi-task but of'):
        evaluate(toy, tmp_path, '--state', states[1], '--method', 'multi-task', '--overwrite')


def test_single_task_results_from_checkpoints(toy, states, tmp_path):
    state = bdd_only(tmp_path)
    results = evaluate(toy, tmp_path, '--state', states[0], states[1], '--single-task', 'CS=50', state,
                       '--common-classes')
    alone = evaluate(toy, tmp_path, '--state', state, '--overwrite')['domains']['BDD']['miou']
    assert results['summary']['single_task'] == {'cityscapes': 50.0, 'BDD': alone}
    assert list(results['common_summary']['single_task']) == ['BDD']
    after = {name: entry['miou'] for name, entry in results['domains'].items()}
    assert results['summary']['delta_m'] == pytest.approx(
        50 * ((after['cityscapes'] - 50) / 50 + (after['BDD'] - alone) / alone))


def test_a_domain_of_void_alone_has_no_figures(toy, tmp_path):
    shutil.copytree(toy / 'bdd100k', tmp_path / 'bdd100k')
    for pair in find_split(DOMAINS['BDD'], tmp_path, 'val').pairs:
        Image.fromarray(np.full_like(np.asarray(Image.open(pair.label)), 255)).save(pair.label)
    drawn = [part for kind in ('overlays', 'extremes', 'confusion') for part in (f'--save-{kind}', tmp_path / kind)]
    results = evaluate(tmp_path, tmp_path, '--state', bdd_only(tmp_path), '--single-task', 'BDD=40', *drawn)
    assert results['domains']['BDD']['miou'] is results['domains']['BDD']['accuracy'] is None
    assert results['summary']['delta_m'] is None and not list((tmp_path / 'extremes').rglob('*.png'))


def test_published_metric_and_trials_are_said(toy, states, capsys):
    run(toy, '--state', states[0], '--published-metric', '--limit-batches', 1, '--batch-size', 2)
    text = ' '.join(capsys.readouterr().out.split())
    assert 'absent from truth and prediction counts 0' in text and 'Trial: 2 images of each domain at most.' in text


@pytest.mark.parametrize('arguments, message', [
    (['--json', '{file}/x.json'], '--json .*x.json cannot be written to: .*name another place'),
    (['--csv', '{folder}'], '--csv .* is a folder, a file name is expected'),
    (['--json', '{folder}/x', '--csv', '{folder}/x'], 'two results would be written to the same file'),
    (['--json', '{folder}/metrics.jsonl'], '--json .*metrics.jsonl is the name of a file that runs write'),
    (['--save-overlays', '{file}'], '--save-overlays .* cannot be written to'),
    (['--save-panels', '{folder}/panels.bmp2'], 'figures are .png, .pdf or .svg, not .bmp2'),
    (['--images', '0'], '--images chooses the images of --save-panels'),
    (['--save-panels', '{folder}/p.png', '--images', 'IDD=0'], "no domain called 'IDD'"),
    (['--save-panels', '{folder}/p.png', '--images', '4'], '--images 4: no image, or more than one'),
    (['--single-task', 'CS=0'], 'an mIoU in percent, above 0'),
    (['--single-task', 'CS=good'], 'neither NAME=mIoU nor a checkpoint'),
    (['--single-task', f'CS={__file__}'], 'a checkpoint names its domain itself; give .*test_eval.py alone'),
    (['--single-task', 'CS=nan'], 'an mIoU in percent'),
    (['--single-task', 'CS=50', 'IDD=50'], '--single-task: .* knows cityscapes, not IDD'),
    (['--single-task', '{two}'], 'contains 2 domains; a checkpoint with one is expected'),
    (['--single-task', 'CS=50', 'Cityscapes=60'], '--single-task Cityscapes=60: cityscapes is given twice'),
    (['--resolution', 'huge'], 'invalid choice'),
    (['--data-root', '{folder}'], 'no val images of cityscapes'),
    (['--only', 'BDD'], '--only: the checkpoint knows cityscapes, not BDD'),
    (['--only', 'CS', '--single-task', 'CS=50'], '--single-task needs the scores of all domains; leave out --only')])
def test_bad_input_is_refused_before_anything_is_evaluated(monkeypatch, toy, states, tmp_path, arguments, message):
    monkeypatch.setattr('mdil.evaluation.evaluation.evaluate', lambda *_, **__: pytest.fail('evaluated'))
    (tmp_path / 'file').write_text('')
    filled = [part.format(file=tmp_path / 'file', folder=tmp_path, two=states[1]) for part in arguments]
    with pytest.raises(UserError, match=message) as error:
        run(toy, '--state', states[0], *filled)
    assert '\n' not in str(error.value)


def test_a_damaged_record_of_the_training_is_told_before_anything_is_evaluated(monkeypatch, toy, states, tmp_path):
    monkeypatch.setattr('mdil.evaluation.evaluation.evaluate', lambda *_, **__: pytest.fail('evaluated'))
    (tmp_path / '2').mkdir()
    shutil.copy(states[1], tmp_path / '2/model_best.pth.tar')
    (tmp_path / '2/metrics.jsonl').write_text('{"epoch": 1, "train": {"loss": 1}, "lr": 1}\n\n')
    with pytest.raises(UserError, match='2/metrics.jsonl: line 1 was not written by a run; move the file away'):
        run(toy, '--state', states[0], tmp_path / '2/model_best.pth.tar')


def test_results_are_written_before_the_figure_that_may_fail(monkeypatch, toy, states, tmp_path, capsys):
    def full(*_):
        raise UserError('the disk is full')
    monkeypatch.setattr(pictures, 'save_panels', full)
    with pytest.raises(UserError, match='the disk is full'):
        run(toy, '--state', states[0], '--json', tmp_path / 'r.json', '--save-panels', tmp_path / 'p.png')
    assert json.loads((tmp_path / 'r.json').read_text())['domains'].keys() == {'cityscapes'}
    assert 'Scores of each domain' in capsys.readouterr().out


@pytest.fixture
def without_cityscapes(toy, tmp_path):
    """A data root with the images of BDD and IDD alone."""
    for name in ('BDD', 'IDD'):
        folder = get_domain(name).folder
        (tmp_path / folder).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / folder).symlink_to(toy / folder)
    return tmp_path


def test_domains_whose_images_one_has_are_scored_alone(without_cityscapes, states, sequence, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, 'draw_row', lambda row, dataset, number, *_: drawn.append((dataset.domain.name, number)))
    with pytest.raises(UserError, match='no val images of cityscapes: .*; or score the other domains alone, with --only'):
        run(without_cityscapes, '--state', states[2])
    with pytest.raises(UserError, match='--only is for one checkpoint'):
        run(without_cityscapes, '--state', *states, '--only', 'BDD')
    found = evaluate(without_cityscapes, tmp_path, '--state', states[2], '--only', 'bdd100k', 'IDD', '--cross-heads',
                     '--common-classes', '--save-panels', tmp_path / 'p.png')
    only = lambda row: {name: row[name] for name in ('BDD', 'IDD')}
    assert found['domains'] == only(sequence[1]['domains'])
    assert found['cross_heads'] == {head: only(row) for head, row in sequence[1]['cross_heads'].items()}
    assert drawn == [('BDD', 1), ('IDD', 2)]
    with pytest.raises(UserError, match='r.json is of eval.py --only; a comparison needs the scores of all domains'):
        compare.read_results([f'a={tmp_path / "r.json"}'])


def test_checkpoints_out_of_order_are_refused(toy, states):
    with pytest.raises(UserError, match='not in step order: .*2.pth knows cityscapes, BDD, but the next, .*1.pth'):
        run(toy, '--state', states[1], states[0])


def seed_results(folder, steps, **protocol):
    """Writes a results.json of those [{domain: mIoU}] as eval.py does."""
    folder.mkdir(parents=True)
    entries = [{'state': 'x', 'domains': {name: {'miou': miou} for name, miou in step.items()}} for step in steps]
    forgetting = {name: steps[0][name] - steps[-1][name] for name in steps[0]} if len(steps) > 1 else {}
    (folder / 'results.json').write_text(json.dumps({
        'domains': entries[-1]['domains'], 'steps': entries, 'summary': {'forgetting': forgetting, 'delta_m': None},
        'protocol': {'height': 32, 'width': 64, 'split': 'val', 'published_metric': False, **protocol},
        'versions': {'torch': '2', 'device': 'CPU', 'git': 'abc'}}))
    return folder


def test_a_last_step_that_learnt_no_domain_has_no_sentence_of_its_own(tmp_path, capsys):
    seed_results(tmp_path / 'mdil', [{'CS': 60.0}, {'CS': 58.0}])
    compare.main([f'mdil={tmp_path}/mdil', '--out', str(tmp_path / 'out'), '--no-picture'])
    assert capsys.readouterr().out.endswith('mdil kept 58.0 of 60.0 on CS: 2.0 points of mIoU lost.\n')


def test_what_several_old_domains_lose_is_a_mean_that_gains_do_not_hide():
    seeds = [{'summary': {'forgetting': {'CS': -2.0, 'BDD': 4.0}}, 'domains': {'CS': {'miou': 58.0}, 'BDD': {'miou': 9.0}}}]
    assert compare.kept_and_lost('mdil', seeds) == (
        'mdil kept 9.0 of 13.0 on BDD and rose from 56.0 to 58.0 on CS: 2.0 points of mIoU lost on average, gains not counted.')


def test_what_is_kept_and_what_is_lost_add_up_as_shown():
    seeds = [{'summary': {'forgetting': {'CS': 0.03}}, 'domains': {'CS': {'miou': 12.34}}}]
    assert compare.kept_and_lost('mdil', seeds) == 'mdil kept 12.3 of 12.3 on CS: 0.0 points of mIoU lost.'


def test_a_domain_that_one_seed_could_not_score_is_left_out_of_the_sentence():
    seeds = [{'summary': {'forgetting': {'CS': 2.0, 'BDD': lost}}, 'domains': {'CS': {'miou': 58.0}, 'BDD': {'miou': 9.0}}}
             for lost in (1.0, None)]
    assert compare.kept_and_lost('mdil', seeds) == 'mdil kept 58.0 of 60.0 on CS: 2.0 points of mIoU lost.'


def test_seeds_give_mean_and_standard_deviation(tmp_path, capsys):
    last = {1: (50.0, 40.0), 2: (56.0, 41.0), 3: (47.0, 45.0)}
    for seed, (first, second) in last.items():
        seed_results(tmp_path / f'seed{seed}' / 'mdil', [{'CS': 60.0}, {'CS': first, 'IDD': second}])
    seed_results(tmp_path / 'joint', [{'CS': 61.25, 'IDD': 52.0}])
    compare.main([f'mdil={tmp_path}/seed[12]/mdil', f'mdil={tmp_path}/seed3/mdil/results.json',
                  f'joint={tmp_path}/joint', '--out', str(tmp_path / 'out'), '--no-picture'])
    text = capsys.readouterr().out

    def shown(values):
        return f'{statistics.mean(values):.2f} +- {np.std(values, ddof=1):.2f}'
    firsts, seconds = zip(*last.values())
    for values in (firsts, seconds, [60 - first for first in firsts], [sum(pair) / 2 for pair in last.values()]):
        assert shown(values) in text
        assert shown(values).replace('+-', '±') in (tmp_path / 'out' / 'comparison.md').read_text()
        assert f'${shown(values).replace("+-", chr(92) + "pm")}$' in (tmp_path / 'out' / 'comparison.tex').read_text()
    assert 'mdil, 3 seeds' in text and '61.25' in text and 'sample standard deviation' in ' '.join(text.split())
    assert max(len(line) for line in text.splitlines() if not line.startswith('written to')) <= 80
    assert text.endswith('mdil kept 51.0 of 60.0 on CS: 9.0 points of mIoU lost.\nOn IDD, learnt last: mdil 42.0, joint 52.0.\n')
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['comparison.md', 'comparison.tex']


def test_compare_shows_the_last_epoch_next_to_the_best(tmp_path, capsys):
    """Where every folder knows both; the best was chosen on the reported images."""
    for name, best, last in (('one', 41.5, 38.25), ('two', 33.75, 33.5)):
        path = seed_results(tmp_path / name, [{'CS': 60.0}, {'CS': 50.0, 'IDD': best}]) / 'results.json'
        result = json.loads(path.read_text())
        result['steps'][-1]['training'] = {'best': {'epoch': 3, 'miou': best}, 'last': {'epoch': 9, 'miou': last}}
        path.write_text(json.dumps(result))
    arguments = [f'one={tmp_path}/one', f'two={tmp_path}/two', '--out', str(tmp_path / 'out'), '--no-picture']
    compare.main(arguments)
    lines = [line.split() for line in capsys.readouterr().out.partition('method ')[2].splitlines()]
    assert lines[0][-6:] == ['best', 'epoch', 'mIoU', 'last', 'epoch', 'mIoU']
    assert [line[-2:] for line in lines if line[:1] in (['one'], ['two'])][:2] == [['41.50', '38.25'], ['33.75', '33.50']]
    seed_results(tmp_path / 'three', [{'CS': 60.0}, {'CS': 50.0, 'IDD': 40.0}])
    compare.main([f'three={tmp_path}/three', *arguments])
    assert 'last epoch mIoU' not in capsys.readouterr().out


def test_compare_refuses_what_is_not_alike(tmp_path):
    folder = seed_results(tmp_path / 'a', [{'CS': 1.0}, {'CS': 1.0, 'IDD': 2.0}])
    for name, other, message in (
            ('b', seed_results(tmp_path / 'b', [{'CS': 1.0, 'IDD': 1.0}], height=64), 'height is 32 and 64'),
            ('b', seed_results(tmp_path / 'c', [{'CS': 1.0, 'IDD': 1.0}], resolution='native'), 'resolution is'),
            ('b', seed_results(tmp_path / 'd', [{'IDD': 1.0, 'CS': 1.0}]), 'different domains or orders'),
            ('a', seed_results(tmp_path / 'e', [{'CS': 1.0, 'IDD': 1.0}]), 'a: its folders hold different steps'),
            ('b', tmp_path / 'none', 'none/results.json cannot be read: No such file or directory; eval.py'),
            ('a', tmp_path / 'e/../a', 'a/results.json is given twice'),
            ('b', tmp_path / 'no*', 'no folder matches the pattern'),
            ('', tmp_path, 'is not NAME=FOLDER')):
        with pytest.raises(UserError, match=message):
            compare.read_results([f'a={folder}', f'{name}={other}'])
    (tmp_path / 'x.json').write_text('{"domains": 3}')
    with pytest.raises(UserError, match='x.json is not a result of eval.py'):
        compare.read_results([f'a={tmp_path}/x.json'])
    for change in (lambda found: found.update(steps=[]), lambda found: found['domains'].update(CS={}),
                   lambda found: found['domains']['CS'].update(miou='x'), lambda found: found.update(versions=[]),
                   lambda found: found['summary'].update(forgetting=None),
                   lambda found: found['steps'][-1].update(training={'best': None, 'last': None})):
        result = json.loads((folder / 'results.json').read_text())
        change(result)
        (tmp_path / 'x.json').write_text(json.dumps(result))
        with pytest.raises(UserError, match='x.json is not a result of eval.py'):
            compare.read_results([f'a={tmp_path}/x.json'])


def test_compare_draws_no_network_that_was_not_scored(toy, states, tmp_path):
    state = shutil.copy(states[1], tmp_path / 'x.pth')
    run(toy, '--state', state, '--json', tmp_path / 'results.json', '--limit-batches', 1)
    shutil.copy(bdd_only(tmp_path), state)
    with pytest.raises(UserError, match='x.pth was replaced after it was evaluated; run eval.py again'):
        compare.main([f'one={tmp_path}', '--data-root', str(toy), '--out', str(tmp_path / 'out'), '--device', 'cpu'])


def test_compare_draws_the_methods_side_by_side(toy, states, tmp_path):
    (tmp_path / 'one').mkdir()
    run(toy, '--state', states[1], '--json', tmp_path / 'one/results.json', '--limit-batches', 1)
    shutil.copytree(tmp_path / 'one', tmp_path / 'two')
    compare.main([f'one={tmp_path}/one', f'two={tmp_path}/two', '--data-root', str(toy), '--out', str(tmp_path),
                  '--device', 'cpu', '--images', 'BDD=1'])
    assert Image.open(tmp_path / 'comparison.png').size[0] > 1000


def test_numbers_are_rounded_and_never_minus_zero():
    assert tables.tex('transfer -1.20') == 'transfer $-$1.20' and tables.tex('-1.20') == '$-1.20$'
    shown = [tables.number(value) for value in (-0.004, 0.125, -1.005, float('nan'), None)]
    assert shown == ['0.00', '0.12', '-1.00', '-', '-'] and tables.number(2.5, 0) == '2'


def test_trials_are_compared_if_they_scored_as_many_images(tmp_path):
    for name, limit, size in (('a', 2, 6), ('b', 4, 3), ('c', 2, 3)):
        seed_results(tmp_path / name, [{'CS': 60.0}], limit_batches=limit, batch_size=size)
    compare.read_results([f'a={tmp_path}/a', f'b={tmp_path}/b'])
    with pytest.raises(UserError, match='evaluated differently, images at most is 12 and 6'):
        compare.read_results([f'a={tmp_path}/a', f'c={tmp_path}/c'])


def test_results_that_are_there_already_are_kept(toy, states, tmp_path, capsys, monkeypatch):
    files = [shutil.copy(state, tmp_path / f'{number}.pth') for number, state in enumerate(states[:2])]
    out, words = tmp_path / 'r.json', ['--limit-batches', '1', '--resume']
    evaluate(toy, tmp_path, '--state', *files, *words)
    before = out.read_bytes()

    def kept(*arguments):
        capsys.readouterr()
        evaluate(toy, tmp_path, *arguments)
        said, same = capsys.readouterr().out, out.read_bytes() == before
        out.write_bytes(before)
        return said if said.startswith(f'kept {out}: it already holds the results of') and same else ''
    assert 'mIoU after step' in kept('--state', *files, *words, '--csv', tmp_path / 'x.csv')
    assert 'cityscapes' in (tmp_path / 'x.csv').read_text()
    assert 'mIoU' not in kept('--state', files[0], *words) != ''      # the first step is in it
    for name in ('csv', 'markdown', 'latex'):
        with pytest.raises(UserError, match='holds later steps, too, so no tables of these were written'):
            kept('--state', files[0], *words, f'--{name}', tmp_path / 'y')
    assert not (tmp_path / 'y').exists()
    for more in (['--published-metric'], ['--single-task', 'CS=50'], ['--height', '64']):
        assert not kept('--state', *files, *words, *more)
    checkpoint.save({**checkpoint.read(files[1]), 'best_acc': 1.0}, files[1])
    os.utime(files[1], ns=(0, 0))
    assert kept('--state', files[0], *words) and not kept('--state', *files, *words)
    for odd in ('{"domains": 1, "steps": [3]}', '{"domains": 1, "steps": []}'):
        out.write_text(odd)
        evaluate(toy, tmp_path, '--state', files[0], *words)
        assert json.loads(out.read_text())['steps'][0]['domains']
    for more, says in ((['--save-panels', tmp_path / 'p.png', '--json', out], 'that pictures could show'), ([], 'needs --json')):
        with pytest.raises(UserError, match=says):
            run(toy, '--state', files[0], '--resume', *more)
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(UserError, match='eval.py --resume works in one process'):
        run(toy, '--state', files[0], '--resume', '--json', out)


@pytest.mark.parametrize('name', ['json', 'csv', 'markdown', 'latex', 'save-panels'])
def test_no_file_is_replaced_unasked(toy, states, tmp_path, monkeypatch, name):
    monkeypatch.setattr(evaluation, 'run', lambda *_: pytest.fail('evaluated'))
    file = tmp_path / 'thesis.pdf'
    file.write_bytes(b'mine \xff')
    with pytest.raises(UserError, match=f'--{name} {file} exists; name another file, or replace it with --overwrite'):
        run(toy, '--state', states[0], f'--{name}', file)
    if name not in ('json', 'save-panels'):
        with pytest.raises(UserError, match='thesis.pdf exists; name another file'):
            run(toy, '--state', states[0], f'--{name}', file, '--resume', '--json', tmp_path / 'r.json')
    with pytest.raises(pytest.fail.Exception, match='evaluated'):
        run(toy, '--state', states[0], f'--{name}', file, '--overwrite')


def test_pictures_in_a_folder_are_not_replaced_unasked(toy, states, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, 'run', lambda *_: pytest.fail('evaluated'))
    for place in ('color/IDD', 'confusion/step1/IDD'):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / 'legend.png').write_text('')
    for name in ('color', 'confusion'):
        with pytest.raises(UserError, match=f'--save-{name} .*{name} holds pictures; name another folder, or replace them with'):
            run(toy, '--state', states[0], f'--save-{name}', tmp_path / name)
    for more in (['--save-overlays', tmp_path / 'color/IDD'], ['--save-color', tmp_path / 'color', '--overwrite']):
        with pytest.raises(pytest.fail.Exception, match='evaluated'):
            run(toy, '--state', states[0], *more)


def test_results_are_extended_with_their_tables_and_those_of_others_kept(toy, states, tmp_path):
    words = ['--limit-batches', '1', '--resume', *(part for name in ('csv', 'markdown', 'latex')
                                                   for part in (f'--{name}', tmp_path / f'r.{name}'))]
    for count in (1, 2, 2):         # the tables of r.json go along with it
        evaluate(toy, tmp_path, '--state', *states[:count], *words)
    assert 'BDD' in (tmp_path / 'r.csv').read_text()
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    moved = shutil.copy(states[0], tmp_path / 'moved.pth')
    evaluate(toy, tmp_path, '--state', moved, states[1], *words)
    with pytest.raises(UserError, match=f'r.json holds the results of {states[1]}, not of {states[2]}; name another file, move this'):
        evaluate(toy, tmp_path, '--state', states[0], states[2], *words)
    assert before == {file: file.read_bytes() for file in before}
    (tmp_path / 'r.latex').write_text('a chapter')
    with pytest.raises(UserError, match='--latex .*r.latex exists; name another file'):
        evaluate(toy, tmp_path, '--state', *states, *words)
    (tmp_path / 'r.json').write_text('{"a list": "of mine"}')
    with pytest.raises(UserError, match='--json .*r.json exists and holds something else'):
        evaluate(toy, tmp_path, '--state', *states, *words)
    assert (tmp_path / 'r.json').read_text() == '{"a list": "of mine"}'


def test_single_task_checkpoints_are_compared_by_content(toy, states, tmp_path, capsys):
    words = '--state', states[0], '--limit-batches', '1', '--resume', '--single-task', tmp_path / 'alone.pth'
    for best, kept in ((1.0, False), (1.0, True), (2.0, False)):
        checkpoint.save({**checkpoint.read(states[0]), 'best_acc': best}, tmp_path / 'alone.pth')
        evaluate(toy, tmp_path, *words)
        assert ('it already holds' in capsys.readouterr().out) == kept


def test_a_checkpoint_that_is_replaced_while_it_is_scored_is_scored_again(toy, states, tmp_path, capsys, monkeypatch):
    file, step = shutil.copy(states[0], tmp_path / 'x.pth'), evaluation.evaluate_step

    def replaced(*arguments):
        checkpoint.save({**checkpoint.read(states[0]), 'best_acc': 1.0}, file)
        return step(*arguments)
    monkeypatch.setattr(evaluation, 'evaluate_step', replaced)
    for _ in range(2):
        evaluate(toy, tmp_path, '--state', file, '--limit-batches', '1', '--resume')
        assert 'it already holds' not in capsys.readouterr().out
        monkeypatch.setattr(evaluation, 'evaluate_step', step)
    evaluate(toy, tmp_path, '--state', file, '--limit-batches', '1', '--resume')
    assert 'it already holds' in capsys.readouterr().out


def test_the_step_of_one_checkpoint_is_its_own(tmp_path):
    (tmp_path / 'opts.json').write_text(json.dumps({'options': {'method': 'mdil', 'domains': ['a', 'b', 'c']}}))
    (tmp_path / 'metrics.jsonl').write_text(json.dumps({'epoch': 1, 'train': {'loss': 1.0}, 'val': {
        'c': {'miou': 2.0, 'loss': 1.0}}, 'lr': 0.1}) + '\n')
    found = training_of(tmp_path / 'model_best.pth.tar')
    table = tables.epoch_table([{'domains': {'c': {}}, 'training': found}])
    assert table.groups[0][0][0] == '3 (c)'


def test_tables_of_steps_have_means_of_what_is_known():
    """Of single-task scores only if there is one for every column; of what is forgotten over the old domains."""
    steps = [{'CS': {'miou': 60.0}}, {'CS': {'miou': 50.0}, 'IDD': {'miou': 40.0}}]
    summary = {'forgetting': {'CS': 10.0}, 'single_task': {'CS': 61.0, 'BDD': 90.0}, 'backward_transfer': None,
               'forward_transfer': None, 'delta_m': None}
    table = tables.step_table(steps, summary)
    assert table.header[1:] == ['CS', 'IDD', 'mean']
    assert table.groups[0] == [['1 (CS)', '60.00', '-', '60.00'], ['2 (IDD)', '50.00', '40.00', '45.00']]
    assert table.groups[1] == [['forgetting', '10.00', '-', '10.00'], ['single-task', '61.00', '-', '-']]


def test_the_help_says_that_domain_takes_no_name():
    text = ' '.join(evaluation.eval_parser().format_help().split())
    assert '--domain {auto} only auto, no name (--only takes names): also score the branch' in text
