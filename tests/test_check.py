"""datasets.check: what is missing, damaged, of unequal size or out of range is found and named."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mdil.datasets import DOMAINS, SegmentationDataset
from mdil.datasets.check import main
from mdil.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT = 12, 8


def save_image(path, size=(WIDTH, HEIGHT)):
    """Writes a noisy image, so that a part of its file is a part of its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def save_label(path, values=0, size=(WIDTH, HEIGHT)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.broadcast_to(np.uint8(values), size[::-1])).save(path)
    return path


def bdd_paths(root, key, split='train'):
    folder = root / 'bdd100k/seg'
    return folder / f'images/{split}/{key}.jpg', folder / f'labels/{split}/{key}_train_id.png'


def save_pair(root, key, values=0, split='train'):
    image, label = bdd_paths(root, key, split)
    return save_image(image), save_label(label, values)


def check(root, *more, domains=('BDD',), splits=('train',)):
    """(whether it is fit, the content of --json) of a check in this process."""
    file = root / 'report.json'
    try:
        fit = main(['--domains', *domains, '--data-root', str(root), '--splits', *splits, '--json', str(file),
                    '--workers', '1', *more]) == 0
    except UserError as error:
        assert 'not fit' in str(error)
        fit = False
    found = json.loads(file.read_text())
    assert found['fit'] == fit
    return fit, found['domains']


def only_error(root):
    """The one error of BDD's training split in `root`, next to a sound pair that is still counted."""
    save_pair(root, 'sound', 3)
    fit, found = check(root)
    train = found['BDD']['train']
    assert not fit and train['pairs'] == 2
    assert train['classes']['wall']['images'] == 1
    assert len(train['errors']) == 1, train['errors']
    return train['errors'][0]


def test_sound_domain(tmp_path, capsys):
    half = np.where(np.arange(WIDTH) < WIDTH // 2, 0, 18)
    save_pair(tmp_path, 'a', half)
    save_pair(tmp_path, 'b', np.where(np.arange(WIDTH) < 3, 255, 0))
    save_pair(tmp_path, 'c', 18, split='val')
    fit, found = check(tmp_path, splits=('train', 'val'))
    assert fit
    pixels = WIDTH * HEIGHT
    classes = found['BDD']['train']['classes']
    assert classes['road'] == {'pixels': pixels * 5 // 4, 'percent': 62.5, 'images': 2}
    assert classes['bicycle'] == {'pixels': pixels // 2, 'percent': 25.0, 'images': 1}
    assert classes['void'] == {'pixels': pixels // 4, 'percent': 12.5, 'images': 1}
    assert classes['car'] == {'pixels': 0, 'percent': 0.0, 'images': 0}
    assert found['BDD']['val']['classes']['bicycle']['percent'] == 100.0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == 'fit to train on (2 notes above)' and sum(line.startswith('note: ') for line in lines) == 2
    assert max(map(len, lines)) <= 80
    assert ['road', '120', '62.5000', '2'] in [line.split() for line in lines]


def test_files_without_partner_are_warnings(tmp_path, capsys):
    save_pair(tmp_path, 'paired')
    images = [str(save_image(bdd_paths(tmp_path, f'image{number}')[0])) for number in range(6)]
    labels = [str(save_label(bdd_paths(tmp_path, f'label{number}')[1])) for number in range(6)]
    fit, found = check(tmp_path)
    train = found['BDD']['train']
    assert fit and train['pairs'] == 1 and train['errors'] == []
    assert [warning['file'] for warning in train['warnings']] == images + labels
    assert {warning['kind'] for warning in train['warnings'][:6]} == {'image without a label'}
    assert {warning['kind'] for warning in train['warnings'][6:]} == {'label without an image'}
    out = capsys.readouterr().out
    assert all(path in out for path in images + labels)


def test_long_lists_are_cut_in_print_only(tmp_path, capsys):
    save_pair(tmp_path, 'paired')
    for number in range(25):
        save_image(bdd_paths(tmp_path, f'image{number}')[0])
    assert len(check(tmp_path)[1]['BDD']['train']['warnings']) == 25
    out = capsys.readouterr().out
    assert out.count('is left out') == 20 and 'and 5 more' in out


@pytest.mark.parametrize('keep', [0, 2, .3, .9, -1, -4, -10, -15])
@pytest.mark.parametrize('which', ['image', 'label'])
def test_truncated(tmp_path, which, keep):
    path = save_pair(tmp_path, 'cut')[which == 'label']
    content = path.read_bytes()
    path.write_bytes(content[:int(keep * len(content)) if 0 < keep < 1 else keep])
    error = only_error(tmp_path)
    assert (error['kind'], error['file']) == (f'unreadable {which}', str(path))
    assert str(path) in error['message']


@pytest.mark.parametrize('suffix', ['_leftImg8bit.jpg', '_leftImg8bit.png'])
def test_truncated_either_format(tmp_path, suffix):
    path = save_image(tmp_path / f'cityscapes/leftImg8bit/train/a/f{suffix}', size=(200, 100))
    save_label(tmp_path / 'cityscapes/gtFine/train/a/f_gtFine_labelTrainIds.png', size=(200, 100))
    assert check(tmp_path, domains=['CS'])[0]
    path.write_bytes(path.read_bytes()[:-1000])
    fit, found = check(tmp_path, domains=['CS'])
    assert not fit and found['cityscapes']['train']['errors'][0]['file'] == str(path)


def test_not_an_image(tmp_path):
    save_pair(tmp_path, 'text')[0].write_text('<html>404</html>')
    assert only_error(tmp_path)['kind'] == 'unreadable image'


def test_impossible_size_in_header(tmp_path):
    path = save_pair(tmp_path, 'huge')[0]
    content = bytearray(path.read_bytes())
    start = content.find(b'\xff\xc0')                   # the frame header of a JPEG
    content[start + 5:start + 9] = b'\xff\xff\xff\xff'
    path.write_bytes(content)
    assert only_error(tmp_path)['kind'] == 'unreadable image'


def test_colour_label(tmp_path):
    save_image(save_pair(tmp_path, 'colour')[1])
    error = only_error(tmp_path)
    assert error['kind'] == 'unreadable label' and 'mode RGB' in error['message']


def test_unequal_sizes(tmp_path):
    image, label = save_pair(tmp_path, 'small')
    save_label(label, size=(WIDTH // 2, HEIGHT))
    error = only_error(tmp_path)
    assert error['kind'] == 'unequal sizes'
    assert all(part in error['message'] for part in (str(image), str(label), '12x8', '6x8'))


@pytest.mark.parametrize('values, cause', [
    ([7, 26, 33], 'label IDs where train IDs are expected'),
    ([0, 19], 'void is 19 where 255 is expected'),
    ([0, 39], 'perhaps label IDs, or IDs of another level'),
    ([0, 128, 254], 'grey levels'),
])
def test_values_out_of_range(tmp_path, values, cause):
    save_pair(tmp_path, 'wrong', np.resize(values, WIDTH))
    error = only_error(tmp_path)
    assert error['kind'] == 'label values' and cause in error['message']
    assert str([value for value in values if value > 18]) in error['message']
    assert 'mdil check' not in error['message']


def test_camvid_void(tmp_path):
    save_image(tmp_path / 'camvid/train/a.png')
    save_label(tmp_path / 'camvid/trainannot/a.png', 255)
    fit, found = check(tmp_path, domains=['camvid'])
    assert not fit and 'void is 255 where 11 is expected' in found['camvid']['train']['errors'][0]['message']


def test_repeated_stem(tmp_path):
    stem = tmp_path / 'IDD_Segmentation/leftImg8bit/train/seq/f_leftImg8bit'
    paths = [str(save_image(stem.with_suffix(suffix))) for suffix in ('.png', '.jpg')]
    save_label(tmp_path / 'IDD_Segmentation/gtFine/train/seq/f_gtFine_labellevel3Ids.png', 25)
    fit, found = check(tmp_path, domains=['IDD'])
    (error,) = found['IDD']['train']['errors']
    assert not fit and error['kind'] == 'repeated image' and all(path in error['message'] for path in paths)
    Path(paths[1]).unlink()
    assert check(tmp_path, domains=['IDD'])[0]


def test_two_labels_of_one_name_are_told(tmp_path, capsys):
    """Linux tells x.PNG from x.png; on file systems that do not, there is only one."""
    save_image(tmp_path / 'camvid/train/a.png')
    labels = [save_label(tmp_path / f'camvid/trainannot/a{suffix}', 3) for suffix in ('.png', '.PNG')]
    if labels[0].samefile(labels[1]):
        pytest.skip('the file system does not tell upper case from lower case')
    fit, found = check(tmp_path, domains=['camvid'])
    (error,) = found['camvid']['train']['errors']
    assert not fit and error['kind'] == 'repeated label' and all(str(path) in error['message'] for path in labels)
    SegmentationDataset(DOMAINS['camvid'], tmp_path, 'train', (32, 64))
    assert 'camvid train: 1 label with the name of another left out, e.g. ' in capsys.readouterr().err


def test_both_kinds_of_cityscapes_labels_are_no_repetition(tmp_path):
    save_image(tmp_path / 'cityscapes/leftImg8bit/train/a/f_leftImg8bit.png')
    for kind in ('labelTrainIds', 'labelIds'):
        save_label(tmp_path / f'cityscapes/gtFine/train/a/f_gtFine_{kind}.png', 7)
    fit, found = check(tmp_path, domains=['CS'])
    assert fit and found['cityscapes']['train']['classes']['traffic sign']['images'] == 1


def test_missing_domain_does_not_stop_the_others(tmp_path, capsys):
    save_pair(tmp_path, 'a')
    fit, found = check(tmp_path, domains=['IDD', 'BDD'], splits=['train', 'val'])
    assert not fit
    assert found['BDD']['train']['errors'] == [] and found['BDD']['train']['pairs'] == 1
    for name, split in (('IDD', 'train'), ('IDD', 'val'), ('BDD', 'val')):
        (error,) = found[name][split]['errors']
        assert error['kind'] == 'no pairs' and f'no {split} images of {name}' in error['message']
        assert found[name][split]['pairs'] == 0
    assert 'no val images of BDD' in capsys.readouterr().out


def test_images_without_any_label(tmp_path):
    save_image(tmp_path / 'cityscapes/leftImg8bit/train/a/f_leftImg8bit.png')
    (error,) = check(tmp_path, domains=['CS'])[1]['cityscapes']['train']['errors']
    assert 'run python -m mdil create-labels cityscapes --datadir' in error['message']


def test_own_domain(tmp_path):
    own = tmp_path / 'elsewhere'
    save_image(own / 'pictures/train/a.png')
    save_label(own / 'masks/train/a.png', [0, 1, 9] * 4)
    own.joinpath('domain.json').write_text(json.dumps({
        'images': 'pictures/{split}', 'labels': 'masks/{split}', 'void': 9,
        'classes': [{'name': 'way', 'color': [1, 2, 3]}, {'name': 'rest' * 20, 'color': [4, 5, 6]}]}))
    fit, found = check(tmp_path, '--data', f'mine={own}', domains=['mine'])
    assert fit
    assert [entry['pixels'] for entry in found['mine']['train']['classes'].values()] == [32, 32, 32]


def own_domain(root, train, val, count=1, **spec):
    """The option that places an own domain of the classes way and rest, with labels of the values given."""
    own = root / 'own'
    for split, values in (('train', train), ('val', val)):
        for number in range(count):
            save_image(own / f'{split}/{split}{number}.png', size=(WIDTH, HEIGHT + number + (split == 'val')))
            save_label(own / f'{split}annot/{split}{number}.png', values,
                       size=(WIDTH, HEIGHT + number + (split == 'val')))
    own.joinpath('domain.json').write_text(json.dumps({
        'images': '{split}', 'labels': '{split}annot',
        'classes': [{'name': 'way', 'color': [1, 2, 3]}, {'name': 'rest', 'color': [4, 5, 6]}], **spec}))
    return f'--data=mine={own}'


def judged(root, *labels, **spec):
    """(fit, errors and remarks of the training split, those of the validation split) of an own domain."""
    fit, found = check(root, own_domain(root, *labels, **spec), domains=['mine'], splits=['train', 'val'])
    return fit, *(([error['message'] for error in found['mine'][split]['errors']], found['mine'][split]['remarks'])
                  for split in ('train', 'val'))


def test_a_class_that_occurs_in_no_training_image_is_noted(tmp_path, capsys):
    assert judged(tmp_path, 0, [0, 1] * 6) == (True, ([], ["class 'rest' occurs in no training image"]), ([], []))
    assert capsys.readouterr().out.splitlines()[-1] == 'fit to train on (1 note above)'
    assert judged(tmp_path, [0, 1] * 6, 0) == (True, ([], []), ([], []))
    assert capsys.readouterr().out.splitlines()[-1] == 'fit to train on'
    save_pair(tmp_path, 'a', np.resize([0, 1], WIDTH))
    remarks = check(tmp_path)[1]['BDD']['train']['remarks']
    assert len(remarks) == 1 and remarks[0].startswith("17 of 19 classes occur in no training image: 'building', ")


def test_nothing_is_said_of_classes_where_no_file_could_be_counted(tmp_path):
    fit, train, _ = judged(tmp_path, 7, [0, 1] * 6)
    assert not fit and train[0] and train[1] == []


def test_a_domain_named_twice_is_refused(toy):
    with pytest.raises(UserError, match='--domains CS cityscapes names a domain twice'):
        main(['--domains', 'CS', 'cityscapes', '--data-root', str(toy), '--pairs-only'])


def test_much_void_is_noted(tmp_path):
    row = [0, 1] + [255] * 10
    assert judged(tmp_path, row, row)[1:] == (([], ['83 % of the train pixels are void']),
                                              ([], ['83 % of the val pixels are void']))
    assert judged(tmp_path, [0, 1] * 4 + [255] * 4, 0) == (True, ([], []), ([], []))
    assert not judged(tmp_path, [0, 1] * 6, 255)[0]


def test_masks_of_0_and_255_are_unfit_unless_declared(tmp_path):
    row = [0, 255] * 6
    fit, (errors, _), (of_val, _) = judged(tmp_path, row, row)
    assert not fit and not of_val and len(errors) == 1
    assert all(part in errors[0] for part in ("'rest' occurs in no image", '255 is void (50 %', '"255": "rest"'))
    assert judged(tmp_path, row, row, values={'0': 'way', '255': 'rest'}) == (True, ([], []), ([], []))


def test_labels_that_count_from_one_are_told(tmp_path):
    for row, message in (([1, 2] * 6, 'do the classes count from 1'), ([0, 1, 2] * 4, 'classes count from 1 and 0 is void')):
        fit, (errors, _), _ = judged(tmp_path, row, row)
        assert not fit and len(errors) == 1 and message in errors[0]
    values = {'0': 'void', '1': 'way', '2': 'rest'}
    assert judged(tmp_path, [0, 1, 2] * 4, [0, 1, 2] * 4, values=values)[0]


def test_an_image_in_two_splits_is_an_error_and_a_copy_is_noted(tmp_path):
    option = own_domain(tmp_path, [0, 1] * 6, [0, 1] * 6)
    for place in ('own/train/train0.png', 'own/trainannot/train0.png'):
        target = tmp_path / place.replace('train', 'val', 1).replace('train0', 'again')
        target.write_bytes((tmp_path / place).read_bytes())
    fit, found = check(tmp_path, option, domains=['mine'], splits=['train', 'val'])
    assert fit and found['mine']['train']['remarks'] == []
    (remark,) = found['mine']['val']['remarks']
    assert remark.startswith('1 images of val are copies of images of train, e.g. ') and 'again.png' in remark
    (tmp_path / 'own/val/again.png').unlink()
    os.link(tmp_path / 'own/train/train0.png', tmp_path / 'own/val/again.png')
    fit, found = check(tmp_path, option, domains=['mine'], splits=['train', 'val'])
    (error,) = found['mine']['val']['errors']
    assert not fit and error['kind'] == 'shared file' and 'train0.png of train' in error['message']


def test_an_image_that_cannot_be_read_is_not_compared(tmp_path):
    """Nor read again: where it may not be read at all, that would end the check."""
    option = own_domain(tmp_path, [0, 1] * 6, [0, 1] * 6)
    for folder in ('own/train', 'own/val'):
        for path in (tmp_path / folder).iterdir():
            path.write_bytes(b'the same')
    fit, found = check(tmp_path, option, domains=['mine'], splits=['train', 'val'])
    kinds = [error['kind'] for split in ('train', 'val') for error in found['mine'][split]['errors']]
    assert not fit and len(kinds) == 2 and 'shared file' not in kinds and found['mine']['val']['remarks'] == []


def test_pairs_only_reads_no_file(tmp_path, capsys):
    option = own_domain(tmp_path, [0, 1] * 6, [0, 1] * 6)
    for path in (tmp_path / 'own').rglob('*.png'):
        path.write_bytes(b'no image')
    words = ['--domains', 'mine', option, '--pairs-only']
    assert main(words) == 0
    assert capsys.readouterr().out.endswith('mine val: 1 pair, 0 errors, 0 warnings\n\n'
                                            'every domain has pairs; no file was read\n')
    Image.new('RGB', (8, 8)).save(tmp_path / 'own/train/train0.jpg')        # training takes the first of a stem
    assert main(words) == 0 and 'mine train: 1 pair, 0 errors, 1 warning\n' in capsys.readouterr().out
    with pytest.raises(UserError, match='--pairs-only counts nothing that --json could hold'):
        main([*words, '--json', str(tmp_path / 'x.json')])
    for path in (tmp_path / 'own/val').iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r'errors in mine val \(1\)'):
        main(words)


def test_one_folder_for_both_splits_is_one_error(tmp_path):
    option = own_domain(tmp_path, [0, 1] * 6, [0, 1] * 6, images='train', labels='trainannot')
    fit, found = check(tmp_path, option, domains=['mine'], splits=['train', 'val'])
    (error,) = found['mine']['val']['errors']
    assert not fit and error['message'].startswith('all 1 images of val are those of train; lists can divide')


def test_linked_folders_are_followed(tmp_path):
    save_image(tmp_path / 'a/f_leftImg8bit.png')
    save_label(tmp_path / 'a/f_gtFine_labelTrainIds.png')
    for folder in ('leftImg8bit', 'gtFine'):
        (tmp_path / f'cityscapes/{folder}/train').mkdir(parents=True)
        (tmp_path / f'cityscapes/{folder}/train/a').symlink_to(tmp_path / 'a')
    fit, found = check(tmp_path, domains=['CS'])
    assert fit and found['cityscapes']['train']['pairs'] == 1


def test_placed_domain(tmp_path):
    save_pair(tmp_path / 'other', 'a')
    assert check(tmp_path, '--data', f'bdd100k={tmp_path / "other/bdd100k"}')[0]


def test_processes_find_what_one_finds(tmp_path):
    for number in range(6):
        save_pair(tmp_path, str(number), number if number < 4 else 20)
    alone = check(tmp_path)
    assert check(tmp_path, '--workers', '2') == alone
    assert [Path(error['file']).name[0] for error in alone[1]['BDD']['train']['errors']] == ['4', '5']


@pytest.mark.parametrize('arguments, message', [
    (['--domains', 'mars'], "unknown domain 'mars'"),
    (['--domains', 'BDD', '--data', 'BDD'], 'NAME=PATH'),
    (['--domains', 'BDD', '--num-workers', 'many'], 'num-workers'),
    (['--domains', 'BDD', '--json', '.'], '--json . is a folder'),
    ([], '--domains'),
])
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        main(arguments)
    assert '\n' not in str(caught.value)


def test_as_command(tmp_path):
    for number in range(4):
        save_pair(tmp_path, str(number), 26 if number == 2 else 0)
    done = subprocess.run([sys.executable, '-m', 'datasets.check', '--domains', 'BDD', '--data-root', str(tmp_path),
                           '--splits', 'train', '--workers', '2'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert done.stderr.splitlines()[-1].endswith('error: not fit to train on, errors in BDD train (1); '
                                                 'fix what is listed above')
    assert '2_train_id.png: label values [26] are not in the class list' in done.stdout


def test_real_domains():
    real = Path(os.environ.get('REAL_DATA', ROOT / '../shared/real'))
    if not (real / 'camvid').is_dir():
        pytest.skip('no real data')
    assert main(['--domains', 'camvid', 'idd-lite', '--data-root', str(real), '--splits', 'val', '--num-workers', '0']) == 0
