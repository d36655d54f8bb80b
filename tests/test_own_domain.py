"""domain.json: what it can say, and that every mistake in it is refused in one sentence."""
import json

import numpy as np
import pytest
from PIL import Image

from mdil.datasets import SegmentationDataset, get_domain
from mdil.datasets.pairs import find_split
from mdil.datasets.segmentation import open_label, to_classes
from mdil.utils.errors import UserError

NAMES = ('road', 'car')
CLASSES = [{'name': name, 'color': [10 * number, 5, 7]} for number, name in enumerate(NAMES)]
SPEC = {'images': '{split}', 'labels': '{split}annot', 'classes': CLASSES}
SIZE = (4, 8)


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(path)
    return path


def declare(folder, text=None, **spec):
    """The domain of a domain.json with `text`, or with SPEC changed by `spec` ('absent' leaves an entry out)."""
    folder.mkdir(exist_ok=True)
    content = {key: value for key, value in {**SPEC, **spec}.items() if value != 'absent'}
    (folder / 'domain.json').write_text(json.dumps(content) if text is None else text)
    return get_domain('mine', {'mine': folder})


def classes_of(folder, raw, **spec):
    """Class indices that a label of the row `raw` of values, or of RGB pixels, gets."""
    write(folder / 'train/a.png', np.zeros((*SIZE, 3)))
    write(folder / 'trainannot/a.png', [raw])
    (pair,) = find_split(declare(folder, **spec), 'anywhere', 'train').pairs
    return to_classes(np.asarray(open_label(pair)), pair)[0].tolist()


def color(index, value):
    return [*CLASSES[:index], {'name': CLASSES[index]['name'], 'color': value}, *CLASSES[index + 1:]]


WRONG = {
    'void is text': ({'void': '255'}, 'void must be a whole number from 0 to 255, or null'),
    'void is a fraction': ({'void': 255.0}, 'void must be a whole number'), 'void too large': ({'void': 256}, 'void must'),
    'void is true': ({'void': True}, 'void must'), 'void negative': ({'void': -1}, 'void must'),
    'void is a class': ({'void': 1}, "void is 1, which is the label value of class 'car'"),
    'void by name': ({'classes': [*CLASSES, {'name': 'Void', 'color': [0, 0, 0]}]}, 'void is not a class'),
    'names repeat': ({'classes': [*CLASSES, CLASSES[1]]}, "two classes are called 'car'"),
    'no classes': ({'classes': []}, '1 to 254 classes'), 'classes missing': ({'classes': 'absent'}, '1 to 254 classes'),
    'too many classes': ({'classes': [{'name': str(n), 'color': [0, 0, 0]} for n in range(255)]}, '1 to 254 classes'),
    'no color': ({'classes': [{'name': 'x'}]}, '"color": .R, G, B'),
    'name is a number': ({'classes': [{'name': 3, 'color': [0, 0, 0]}]}, 'name of class 0 must be a text'),
    'name is empty': ({'classes': [{'name': ' ', 'color': [0, 0, 0]}]}, 'name of class 0 must be a text'),
    'name with a blank': ({'classes': [{'name': 'road ', 'color': [0, 0, 0]}]}, "'road ', begins or ends with a blank"),
    'void with a blank': ({'classes': [{'name': ' void', 'color': [0, 0, 0]}]}, "' void', begins or ends with a blank"),
    'an id that nothing reads': ({'classes': [{'name': 'x', 'color': [0, 0, 0], 'id': 7}]}, 'nothing else'),
    'color of two': ({'classes': color(1, [1, 2])}, "color of class 'car' must be"),
    'color too large': ({'classes': color(1, [1, 2, 256])}, "color of class 'car' must be"),
    'color of fractions': ({'classes': color(1, [.1, .2, .3])}, "color of class 'car' must be"),
    'color is text': ({'classes': color(1, '#ff0000')}, "color of class 'car' must be"),
    'weights all 0': ({'weights': [0, 0, 0]}, 'weights of all classes are 0'),
    'weight of void alone': ({'weights': [0, 0, 1]}, 'weights of all classes are 0'),
    'weight negative': ({'weights': [-1, 1, 0]}, '-1 is not a weight'),
    'weight not finite': ({'weights': [float('nan'), 1, 0]}, 'nan is not a weight'),
    'weight infinite': ({'weights': [float('inf'), 1, 0]}, 'inf is not a weight'),
    'weight is text': ({'weights': ['1', 1, 0]}, 'not a weight'), 'weight is true': ({'weights': [True, 1, 0]}, 'not a weight'),
    'weights too few': ({'weights': [1.0]}, '1 weights for 2 classes'), 'weights is a number': ({'weights': 3}, 'a list of 3'),
    'other braces': ({'images': '{city}/{split}'}, 'only braces it may have are {split}'), 'lone brace': ({'labels': 'a}'}, 'only braces'),
    'format of a brace': ({'images': '{split!r}'}, 'only braces it may have are {split}'),
    'no name of a file': ({'images': 'a\ud800'}, '"images" must be a text'),
    'images is a list': ({'images': ['a']}, '"images" must be a text'), 'no images': ({'images': 'absent'}, 'is missing'),
    'no labels': ({'labels': 'absent', 'train': 'train.txt'}, '"labels" is missing'),
    'an entry misspelt': ({'viod': 3}, "'viod' is not an entry"),
    'suffix is a number': ({'image_suffix': 3}, '"image_suffix" must be'), 'no suffix': ({'label_suffix': []}, '"label_suffix"'),
    'one folder, one suffix': ({'labels': '{split}', 'label_suffix': '.PNG'}, 'lie in one folder'),
    'values is a list': ({'values': [1, 2]}, '"values" must be an object'),
    'value too large': ({'values': {'256': 'car'}}, "the key '256'"), 'value is text': ({'values': {'x': 'car'}}, "the key 'x'"),
    'value of no class': ({'values': {'1': 'cat'}}, "'1' to 'cat', which is neither a class"),
    'value of a list': ({'values': {'1': ['car']}}, 'neither a class'),
    'value twice': ({'values': {'1': 'car', '01': 'road'}}, "two entries for '01'"),
    'void is mapped': ({'values': {'255': 'car'}, 'void': 255}, "void is 255, which is the label value of class 'car'"),
    'by_color is text': ({'by_color': 'yes'}, 'true or false'),
    'void no color': ({'by_color': True, 'void': 255}, 'void must be a color'),
    'void is the color of a class': ({'by_color': True, 'void': [10, 5, 7]}, "void is the color of class 'car'"),
    'colors repeat': ({'by_color': True, 'classes': color(1, [0, 5, 7])}, 'have the same color'),
    'color of another class': ({'by_color': True, 'values': {'10,5,7': 'road'}}, "color of class 'car' to another"),
    'no color as key': ({'by_color': True, 'values': {'10': 'road'}}, "the key '10'")}


@pytest.mark.parametrize('name', WRONG)
def test_a_mistake_is_refused_by_name(tmp_path, name):
    spec, message = WRONG[name]
    with pytest.raises(UserError, match=message) as error:
        declare(tmp_path, **spec)
    assert '\n' not in str(error.value) and f"domain 'mine': {tmp_path}/domain.json cannot be used" in str(error.value)


@pytest.mark.parametrize('text, message', [
    ('', 'not JSON'), ('[]', 'an object'), ('{"classes": 1, "classes": 2}', "'classes' is stated twice"),
    ('{"void": 1' + '0' * 5000 + '}', 'not JSON'), ('[' * 10 ** 5, 'not JSON'), ('\ufeff{}', 'classes')])
def test_a_file_that_is_no_declaration_is_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        declare(tmp_path, text)


def test_no_domain_can_be_called_auto(tmp_path):
    declare(tmp_path)
    with pytest.raises(UserError, match='no domain can be called auto'):
        get_domain('Auto', {'Auto': tmp_path})
    for name in ('..', 'a/b', 'a\u00a0b', 'a\nb', ' a', '-a', '\u9053' * 23):       # 9 bytes each
        with pytest.raises(UserError, match='cannot be the name of a domain, because folders are called after it'):
            get_domain(name, {name: tmp_path})
    assert get_domain('\u9053' * 22, {'\u9053' * 22: tmp_path}).name


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    assert declare(tmp_path, '\ufeff' + json.dumps(SPEC)).classes == NAMES


def test_void_is_255_another_value_or_none(tmp_path):
    assert classes_of(tmp_path, [0, 1, 255]) == [0, 1, 2]
    assert classes_of(tmp_path, [0, 1, 9], void=9) == [0, 1, 2]
    assert classes_of(tmp_path, [0, 1, 1], void=None) == [0, 1, 1]
    for void, value in ((None, 255), (9, 255)):
        with pytest.raises(UserError, match=r'a.png: label values \[255\]'):
            classes_of(tmp_path, [0, value, 0], void=void)


def test_values_map_label_values_to_classes(tmp_path):
    values = {'0': 'void', '7': 'car', '8': 'road', '11': 'road', '3': None}
    assert classes_of(tmp_path, [0, 7, 8, 11, 3, 255], values=values) == [2, 1, 0, 0, 2, 2]
    assert classes_of(tmp_path, [0, 255], values={'0': 'road', '255': 'car'}) == [0, 1]
    with pytest.raises(UserError, match=r'label values \[1\]'):
        classes_of(tmp_path, [1, 7], values=values)


def test_labels_that_count_from_one_are_told(tmp_path):
    with pytest.raises(UserError, match='count from 1'):
        classes_of(tmp_path, [1, 2, 255])
    assert classes_of(tmp_path, [1, 2, 0], values={'0': 'void', '1': 'road', '2': 'car'}) == [0, 1, 2]


def test_colors_are_classes_where_stated(tmp_path):
    pixels = [[0, 5, 7], [10, 5, 7], [0, 0, 0], [0, 5, 7]]
    assert classes_of(tmp_path, pixels, by_color=True) == [0, 1, 2, 0]
    further = {'200,200,200': 'void', '1,2,3': 'car'}
    assert classes_of(tmp_path, [*pixels, [200, 200, 200], [1, 2, 3]], by_color=True, values=further) == [0, 1, 2, 0, 2, 1]
    assert classes_of(tmp_path, [*pixels[:2], [9, 9, 9]], by_color=True, void=[9, 9, 9]) == [0, 1, 2]
    black = color(0, [0, 0, 0])
    assert classes_of(tmp_path, pixels[1:3], by_color=True, classes=black) == [1, 0]
    with pytest.raises(UserError, match=r'a.png: the colors \[\[0, 0, 0\]\] are not in the class list'):
        classes_of(tmp_path, pixels, by_color=True, void=None)
    with pytest.raises(UserError, match='mode RGB.*by_color'):
        classes_of(tmp_path, pixels)


def test_a_label_of_colors_is_resized_as_one_of_numbers_is(tmp_path):
    rows = np.random.default_rng(0).integers(0, 2, (8, 16))
    found = []
    for folder, label, more in (('a', rows, {}), ('b', np.array([[0, 5, 7], [10, 5, 7]])[rows], {'by_color': True})):
        write(tmp_path / folder / 'train/x.png', np.zeros((8, 16, 3)))
        write(tmp_path / folder / 'trainannot/x.png', label)
        found.append(SegmentationDataset(declare(tmp_path / folder, **more), '', 'train', SIZE).load(0)[1].tolist())
    assert found[0] == found[1] and sorted({value for row in found[0] for value in row}) == [0, 1]


def test_suffixes_are_stated_and_match_in_any_case(tmp_path):
    """The names of ACDC, and of CamVid as it was published."""
    for name in ('f_rgb_anon.png', 'F2_RGB_ANON.PNG'):
        write(tmp_path / 'all/train' / name, np.zeros((*SIZE, 3)))
    for name in ('f_gt_labelTrainIds.png', 'F2_gt_labelTrainIds.png', 'f_gt_labelColor.png'):
        write(tmp_path / 'all/train' / name, np.zeros(SIZE))
    domain = declare(tmp_path, images='all/{split}', labels='all/{split}', image_suffix='_rgb_anon.png',
                     label_suffix='_gt_labelTrainIds.png')
    found = find_split(domain, '', 'train')
    assert [(pair.image.name, pair.label.name) for pair in found.pairs] == [
        ('F2_RGB_ANON.PNG', 'F2_gt_labelTrainIds.png'), ('f_rgb_anon.png', 'f_gt_labelTrainIds.png')]


def test_images_without_labels_say_what_the_folder_holds(tmp_path):
    for name in ('f.png', 'f_colors.png'):
        write(tmp_path / 'all' / name, np.zeros((*SIZE, 3)))
    domain = declare(tmp_path, images='all', labels='all', image_suffix='.png', label_suffix='_L.png')
    with pytest.raises(UserError, match=r'none of the 2 images of mine, e.g. f.png, has a label \*_L.png in .*all, which '
                                        'holds 2 files, e.g. f.png'):
        find_split(domain, '', 'train')


@pytest.mark.parametrize('name', ['x.JPG', 'x.tif', 'x.WEBP', 'x.Jpeg', 'x.bmp'])
def test_images_of_any_wanted_format_count(tmp_path, name):
    write(tmp_path / 'train' / name, np.zeros((*SIZE, 3)))
    write(tmp_path / 'trainannot/x.PNG', np.zeros(SIZE))
    image, _ = SegmentationDataset(declare(tmp_path), '', 'train', SIZE).load(0)
    assert not image.any()


def listed(folder, text, **spec):
    """Names of the pairs of a list of the content `text` (text or bytes)."""
    content = text if isinstance(text, bytes) else text.encode()
    (folder / 'train.txt').write_bytes(content)
    found = find_split(declare(folder, train='train.txt', **spec), '', 'train')
    return [(pair.image.name, pair.label.name) for pair in found.pairs]


def test_lists_of_pairs(tmp_path):
    for name in ('a', 'b c'):
        write(tmp_path / f'im/{name}.png', np.zeros((*SIZE, 3)))
        write(tmp_path / f'gt/{name}.png', np.zeros(SIZE))
        write(tmp_path / f'gt/{name}_L.png', np.ones(SIZE))
    alone = {'images': 'absent', 'labels': 'absent'}
    for text in ('im/a.png gt/a_L.png\n', '/im/a.png   /gt/a_L.png\r\n\r\n', '\ufeffim/a.png\tgt/a_L.png',
                 f'{tmp_path}/im/a.png {tmp_path}/gt/a_L.png'):
        assert listed(tmp_path, text, **alone) == [('a.png', 'a_L.png')]
    assert listed(tmp_path, 'im/b c.png gt/b c_L.png\nim/a.png gt/a.png') == [('b c.png', 'b c_L.png'), ('a.png', 'a.png')]
    assert listed(tmp_path, 'a\nb c.png', images='im', labels='gt') == [('a.png', 'a.png'), ('b c.png', 'b c.png')]
    (tmp_path / 'im/a.png').rename(tmp_path / 'im/a.JPG')
    for text in ('a', 'a.JPG'):
        assert listed(tmp_path, text, images='im', labels='gt') == [('a.JPG', 'a.png')]
    with pytest.raises(UserError, match='no list of pairs for val'):
        find_split(declare(tmp_path, train='train.txt', **alone), '', 'val')


def test_names_in_lists_may_hold_any_bytes(tmp_path):
    for folder, value in (('im', np.zeros((*SIZE, 3))), ('gt', np.zeros(SIZE))):
        write(tmp_path / folder / 'x.png', value).rename(tmp_path / folder / 'stra\udcdfe.png')
    assert listed(tmp_path, b'im/stra\xdfe.png gt/stra\xdfe.png') == [('stra\udcdfe.png',) * 2]


@pytest.mark.parametrize('text, message', [
    ('im/a.png gt/a.png\nim/x.png gt/a.png', r'train.txt line 2: .*im/x.png is not a file'),
    ('im/a.png im/../im/a.png', 'line 1 names .*im/a.png as the image and as its label'),
    ('im/a.png gt/x.png', 'line 1: .*gt/x.png is not a file'), ('im/b c.png gt/b c.png', 'line 1: .*gt/b c.png is not a file'),
    ('/no/x.png gt/a.png', 'line 1: .*/no/x.png is not a file, nor is /no/x.png$'), ('im/a.png', 'line 1 has one name'),
    ('im/a.png gt/a.png\n\nim/a.png gt/a.png', 'line 3 repeats the image of line 1'), ('\n', 'lists no pairs')])
def test_a_list_that_is_wrong_names_the_line(tmp_path, text, message):
    for name in ('a', 'b c'):
        write(tmp_path / f'im/{name}.png', np.zeros((*SIZE, 3)))
    write(tmp_path / 'gt/a.png', np.zeros(SIZE))
    with pytest.raises(UserError, match=message):
        listed(tmp_path, text, images='absent', labels='absent')
    (tmp_path / 'train.txt').unlink()
    with pytest.raises(UserError, match='train.txt cannot be read'):
        find_split(get_domain('mine', {'mine': tmp_path}), '', 'train')
