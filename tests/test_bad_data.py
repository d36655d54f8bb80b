"""Images and labels as they come: handled right, or refused by name."""
import json
import os
import shutil
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mdil import train
from mdil.datasets import SegmentationDataset, get_domain
from mdil.datasets.pairs import Pair
from mdil.datasets.segmentation import open_image, open_label
from mdil.losses import cross_entropy_parts
from mdil.models import checkpoint
from mdil.training.domain_data import DomainData
from mdil.training.digest import check_unchanged, data_digests
from mdil.utils.errors import UserError

SIZE = (16, 32)
RGB = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """A camvid of three random training and two validation images under tmp_path."""
    for split, count in (('train', 3), ('val', 2)):
        for number in range(count):
            put(tmp_path / f'camvid/{split}/x{number}.png', Image.fromarray(RGB))
            put(tmp_path / f'camvid/{split}annot/x{number}.png', Image.fromarray(np.full(SIZE, number, np.uint8)))
    return tmp_path / 'camvid'


def put(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def load(folder, index=0):
    return SegmentationDataset(get_domain('camvid'), folder.parent, 'train', SIZE).load(index)


@pytest.mark.parametrize('mode', ['L', 'P', 'RGBA', 'LA', 'CMYK', '1'])
def test_other_colour_modes_become_rgb(folder, mode):
    """What Pillow converts without loss of meaning is converted; alpha is dropped."""
    image = Image.fromarray(RGB).convert('P', palette=Image.Palette.ADAPTIVE) if mode == 'P' else Image.fromarray(
        RGB).convert(mode)
    (folder / 'train/x0.png').unlink()
    put(folder / f'train/x0.{"jpg" if mode == "CMYK" else "png"}', image, **({'quality': 100} if mode == 'CMYK' else {}))
    pixels, _ = load(folder)
    difference = np.abs(pixels.numpy().transpose(1, 2, 0).astype(int) - np.asarray(image.convert('RGB')).astype(int))
    assert difference.mean() < (3 if mode == 'CMYK' else 1e-9)


@pytest.mark.parametrize('kind, form', [(np.uint16, 'PNG'), (np.int32, 'TIFF'), (np.float32, 'TIFF')])
def test_images_of_more_than_eight_bits_are_refused(folder, kind, form):
    Image.fromarray(np.full(SIZE, 300, kind)).save(folder / 'train/x0.png', format=form)
    with pytest.raises(UserError, match=r'x0.png: .* 8 bits per channel'):
        load(folder)


def test_sixteen_bit_labels_are_refused(folder):
    Image.fromarray(np.full(SIZE, 3, np.uint16)).save(folder / 'trainannot/x0.png')
    with pytest.raises(UserError, match='x0.png: label image has mode I'):
        load(folder)


@pytest.mark.parametrize('name', ['x0.png', 'x0.jpg'])
def test_labels_stored_as_jpeg_are_refused(folder, name):
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(folder / 'trainannot' / name, format='JPEG')
    for by_color in (False, True):
        with pytest.raises(UserError, match=f'{name}: a label stored as JPEG'):
            open_label(Pair(folder / 'train/x0.png', folder / 'trainannot' / name, {0: 0}, by_color))


@pytest.mark.parametrize('kind', ['TIFF', 'PNG', 'WEBP'])
def test_files_of_several_images_are_refused(folder, kind):
    pages = [Image.new('L', SIZE[::-1], level) for level in (0, 200)]
    pages[0].save(folder / 'x', format=kind, save_all=True, append_images=pages[1:])
    for read in (lambda: open_image(folder / 'x'), lambda: open_label(Pair(None, folder / 'x', {}))):
        with pytest.raises(UserError, match='x holds 2 images, one is expected'):
            read()


def test_a_phones_photo_with_more_behind_it_is_read(folder):
    red, grey = Image.new('RGB', SIZE[::-1], 'red'), Image.new('RGB', SIZE[::-1], 'grey')
    red.save(folder / 'x.jpg', format='MPO', save_all=True, append_images=[grey])
    assert open_image(folder / 'x.jpg').getpixel((0, 0))[0] > 250


def test_palette_labels_keep_their_indices(folder):
    label = Image.fromarray(np.full(SIZE, 7, np.uint8), 'L').copy()
    label = Image.fromarray(np.asarray(label))
    label.putpalette([value for _ in range(256) for value in (9, 9, 9)])
    put(folder / 'trainannot/x0.png', label)
    assert load(folder)[1].unique().tolist() == [7]


@pytest.mark.parametrize('orientation, refused', [(3, False), (6, True)])
def test_exif_rotation_is_not_applied_and_said_where_sizes_differ(folder, orientation, refused):
    """Labels lie on the pixels as stored; a label drawn on the rotated picture differs in size."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    (folder / 'train/x0.png').unlink()
    put(folder / 'train/x0.jpg', Image.fromarray(RGB), exif=exif, quality=100)
    if refused:
        put(folder / 'trainannot/x0.png', Image.fromarray(np.zeros(SIZE[::-1], np.uint8)))
        with pytest.raises(UserError, match='x0.jpg is 32x16 but its label .* is 16x32.*EXIF'):
            load(folder)
    else:
        pixels = load(folder)[0].numpy().transpose(1, 2, 0).astype(int)
        assert np.abs(pixels - np.asarray(Image.open(folder / 'train/x0.jpg').convert('RGB'))).max() == 0


START = ['--domains', 'camvid', '--height', '16', '--num-epochs', '1', '--batch-size', '2', '--num-workers', '0', '--device',
         'cpu']


def learn(folder, savedir, *arguments):
    train.main([*START, '--data-root', str(folder.parent), '--savedir', str(savedir), *arguments])
    return json.loads((savedir / 'metrics.jsonl').read_text())


def test_bad_files_stop_training_by_name_or_are_left_out_and_counted(folder, tmp_path, capsys):
    for name in ('train/x1.png', 'valannot/x0.png'):
        path = folder / name
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match='x[01].png.*cannot be read'):
        learn(folder, tmp_path / 'a', '--class-weights', 'none')
    learn(folder, tmp_path / 'b', '--class-weights', 'none', '--skip-bad-files')
    said = capsys.readouterr().err
    assert 'camvid train: 1 bad files left out' in said and 'camvid val: 1 bad files left out' in said


def test_bad_files_left_out_are_not_counted_for_class_weights_either(folder, tmp_path, capsys):
    path = folder / 'trainannot/x1.png'
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match='x1.png cannot be read'):
        learn(folder, tmp_path / 'a', '--class-weights', 'computed')
    learn(folder, tmp_path / 'b', '--class-weights', 'computed', '--skip-bad-files')
    assert 'camvid train: 1 bad files left out' in capsys.readouterr().err
    weights = json.loads((tmp_path / 'b/opts.json').read_text())['class_weights']['camvid']
    assert weights == pytest.approx([1 / np.log(1.1 + (index in (0, 2)) / 2) if index < 11 else 0 for index in range(12)])


def png(*pixels):
    """A PNG of SIZE whose chunks match their checksums, whatever its compressed pixels are."""
    chunks = [(b'IHDR', struct.pack('>IIBBBBB', *SIZE[::-1], 8, 2, 0, 0, 0)), *((b'IDAT', part) for part in pixels), (b'IEND', b'')]
    return b'\x89PNG\r\n\x1a\n' + b''.join(struct.pack('>I', len(part)) + kind + part + struct.pack('>I', zlib.crc32(kind + part))
                                          for kind, part in chunks)


# Decoders such as libpng's end the process on some of these, at exactly twice the size of the training, too.
@pytest.mark.parametrize('damage', [
    lambda whole: whole[:500] + bytes([whole[500] ^ 4]) + whole[501:], lambda whole: png(b'x'), lambda whole: png(b''), lambda whole: png(),
    lambda whole: png(zlib.compress(bytes(100))), lambda whole: png(zlib.compress(bytes(16 * 97))[:-9] + b'123456789')],
    ids=['flipped bit', 'no stream', 'no byte', 'no pixels', 'few pixels', 'wrong end'])
def test_a_damaged_png_is_named_and_can_be_left_out(damage, folder, tmp_path, capsys):
    path = folder / 'train/x0.png'
    path.write_bytes(damage(path.read_bytes()))
    small = '--height', '8', '--class-weights', 'none'
    with pytest.raises(UserError, match='x0.png cannot be read'):
        learn(folder, tmp_path / 'a', *small)
    learn(folder, tmp_path / 'b', *small, '--skip-bad-files')
    assert 'camvid train: 1 bad files left out' in capsys.readouterr().err


def test_what_is_odd_about_the_labels_is_said_before_training(folder, tmp_path, capsys):
    (folder / 'val/x0.png').unlink()
    (folder / 'val/x0.png').symlink_to(folder / 'train/x2.png')
    learn(folder, tmp_path / 'a', '--class-weights', 'computed')
    said = capsys.readouterr().err
    assert "camvid train: 8 of 11 classes occur in no training image: 'road', 'sidewalk'" in said
    assert 'camvid: 1 validation images are also training images, e.g. ' in said and 'val/x0.png' in said


def test_masks_of_0_and_255_are_refused_before_training(folder, tmp_path):
    for path in folder.glob('*annot/*'):
        put(path, Image.fromarray(np.where(RGB[..., 0] > 99, 255, 0).astype(np.uint8)))
    (folder / 'domain.json').write_text(json.dumps({'images': '{split}', 'labels': '{split}annot', 'classes': [
        {'name': name, 'color': [0, 0, 0]} for name in ('background', 'road')]}))
    with pytest.raises(UserError, match="own train: class 'road' occurs in no image.*255 is void"):
        learn(folder, tmp_path / 'a', '--domains', 'own', '--data', f'own={folder}')


def stop_after_one_epoch(folder, savedir, *arguments):
    """Begins a run of two epochs; returns a function that resumes it, in another folder if need be."""
    real, count = train.train_epoch, [0]

    def stopping(*given):
        count[0] += 1
        if count[0] == 2:
            raise KeyboardInterrupt
        return real(*given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'train_epoch', stopping)
        with pytest.raises(KeyboardInterrupt):
            learn(folder, savedir, '--num-epochs', '2', *arguments)
    return lambda place=folder: train.main([*START, '--data-root', str(place.parent), '--savedir', str(savedir),
                                            '--num-epochs', '2', '--resume', *arguments])


def replace_labels(folder):
    """By others of the same size in bytes, with the times of those there were."""
    for path in (folder / 'trainannot').iterdir():
        before = path.stat()
        path.write_bytes((folder / 'trainannot' / ('x1.png' if path.name == 'x0.png' else 'x2.png')).read_bytes())
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def rename_pair(folder):
    for place in ('train', 'trainannot'):
        (folder / place / 'x1.png').rename(folder / place / 'y.png')


CHANGES = {'labels': (replace_labels, r'content of labels \(camvid train\)'),
           'pairs': (rename_pair, r'which images and labels there are \(camvid train\)'),
           'fewer': (lambda folder: (folder / 'val/x0.png').unlink(), r'which images and labels there are \(camvid val\)'),
           'images': (lambda folder: put(folder / 'train/x1.png', Image.fromarray(RGB * 0)), 'sizes of image files')}


def test_other_data_than_the_stopped_run_had_is_refused_by_name(folder, tmp_path):
    resume = stop_after_one_epoch(folder, tmp_path / 'a', '--class-weights', 'none')
    for name, (change, message) in CHANGES.items():
        shutil.copytree(folder, tmp_path / name / 'camvid')
        change(tmp_path / name / 'camvid')
        with pytest.raises(UserError, match=f'--resume: the data of the run in .* changed since it stopped: .*{message}'):
            resume(tmp_path / name / 'camvid')


def test_other_weights_are_refused_and_moved_data_is_not(folder, tmp_path):
    weights = tmp_path / 'weights.json'
    weights.write_text(json.dumps({'camvid': [1] * 12}))
    resume = stop_after_one_epoch(folder, tmp_path / 'a', '--class-weights', str(weights))
    shutil.copytree(folder, tmp_path / 'elsewhere/camvid')      # with other times
    weights.write_text(json.dumps({'camvid': [1] * 10 + [2] * 2}))
    with pytest.raises(UserError, match=r'class weights \(camvid\)'):
        resume()
    weights.write_text(json.dumps({'camvid': [1] * 11 + [2]}))  # void's does not count
    resume(tmp_path / 'elsewhere/camvid')
    content = checkpoint.read(tmp_path / 'a/checkpoint.pth.tar')
    assert content['epoch'] == 2 and content['domains'][0]['class_names'][:2] == ['sky', 'building']


def test_renamed_classes_are_refused_and_a_run_of_before_digests_goes_on():
    domain = get_domain('camvid')
    found = [data_digests([DomainData(0, replace(domain, classes=(name, *domain.classes[1:])), torch.ones(12))])
             for name in ('sky', 'heaven')]
    with pytest.raises(UserError, match=r'changed since it stopped: class names \(camvid\); restore'):
        check_unchanged(*found, 'x')
    for before in (found[1], {}):
        check_unchanged(before, found[1], 'x')


def test_nothing_but_bad_files_is_refused(folder, tmp_path):
    for path in (folder / 'train').iterdir():
        path.write_bytes(b'')
    with pytest.raises(UserError, match='all 3 .* are bad'):
        learn(folder, tmp_path / 'a', '--class-weights', 'none', '--skip-bad-files')


def test_all_void_training_labels_change_nothing_but_statistics(folder, tmp_path):
    for path in (folder / 'trainannot').iterdir():
        put(path, Image.fromarray(np.full(SIZE, 11, np.uint8)))
    assert learn(folder, tmp_path / 'a', '--class-weights', 'none')['train']['loss'] == 0


def test_all_void_validation_labels_are_refused(folder, tmp_path):
    for path in (folder / 'valannot').iterdir():
        put(path, Image.fromarray(np.full(SIZE, 11, np.uint8)))
    with pytest.raises(UserError, match='no pixel that is not void in the val images of camvid'):
        learn(folder, tmp_path / 'a', '--class-weights', 'none')


def test_an_empty_split_is_refused(folder, tmp_path):
    for path in (folder / 'val').iterdir():
        path.unlink()
    with pytest.raises(UserError, match='no val images of camvid: looked in'):
        learn(folder, tmp_path / 'a')


def test_a_loss_that_is_not_finite_names_the_batch_and_keeps_the_checkpoint(folder, tmp_path, monkeypatch):
    factors = iter([1.0] * 2)       # one finite epoch of two batches

    def infinite(*arguments):
        total, mass = cross_entropy_parts(*arguments)
        return total * next(factors, float('inf')), mass
    monkeypatch.setattr('mdil.losses.terms.cross_entropy_parts', infinite)
    with pytest.raises(UserError, match='the loss is inf in epoch 2; the last checkpoint is kept.*x[0-2].png, .*x[0-2].png'):
        learn(folder, tmp_path / 'a', '--class-weights', 'none', '--num-epochs', '2')
    assert checkpoint.read(tmp_path / 'a/checkpoint.pth.tar')['epoch'] == 1
