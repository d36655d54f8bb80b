"""benchmarks.claims: the comparisons of docs/results.md are those that the stored results give."""
import re
import statistics

import pytest

from mdil.benchmarks import claims
from mdil.benchmarks.claims import BEST, SECTIONS, STORED_FILES, Difference, Scores, interval, line, minus, points, relative
from mdil.utils.errors import UserError
from tests.conftest import ROOT

PAGE = (ROOT / 'docs/results.md').read_text()
ONE = Scores({'0': {'a': 50.0, 'b': 30.0}, '1': {'a': 52.0, 'b': 33.0}, '2': {'a': 1.0, 'b': 1.0}}, ('x', 'y'))
OTHER = Scores({'1': {'a': 40.0, 'b': 30.0, 'c': 9.0}, '0': {'a': 40.0, 'b': 20.0, 'c': 9.0}}, ('y', 'z'))


def test_the_page_of_comparisons_is_what_the_stored_results_give():
    """After a change: python -m benchmarks.claims --markdown docs/comparisons.md."""
    assert (ROOT / 'docs/comparisons.md').read_text() == claims.page()


def test_the_page_counts_its_comparisons():
    made, established, corrected = claims.counts()
    assert (f'There are {made} comparisons; {established} meet the rule, where chance alone would give two or three. With '
            "Bonferroni's correction (5 % over all of them) only five do") in ' '.join(PAGE.split())
    assert corrected == 5


def test_the_readme_says_what_the_stored_results_give():
    """Each figure with a spread, and in the table whether it is established."""
    section = (ROOT / 'README.md').read_text().split('\n## Results\n')[1].split('\n## ')[0]
    quoted = re.findall(r'(\**)(-?\d+\.\d+ ± \d+\.\d+)(?: %)?\1', ' '.join(section.split()))
    given = [cells for title in SECTIONS for group in claims.section_table(title).groups for cells in group]
    found = {cells[1].replace('+-', '±').rpartition(' ')[0]: cells[3].startswith('**') for cells in given}
    assert len(quoted) == 20 and all(figure in found for _, figure in quoted)
    assert all(found[figure] == bool(stars) for stars, figure in quoted[:16])


def test_differences_are_paired_by_seed_and_domain():
    assert points(ONE, OTHER) == Difference({'0': 10.0, '1': 7.5}, 'points', ('x', 'y', 'z'))
    assert points(ONE, OTHER, 'b').seeds == {'0': 10.0, '1': 3.0}
    assert relative(ONE, OTHER) == Difference({'0': 37.5, '1': 20.0}, '%', ('x', 'y', 'z'))
    assert minus(points(ONE, OTHER), points(ONE, OTHER, 'b')).seeds == {'0': 0.0, '1': 4.5}


def test_a_line_has_n_spread_p_and_interval():
    """t of 5 % with two degrees of freedom is 4.3027, from a table."""
    values = [2.0, 3.0, 4.0]
    assert line('x', Difference(dict(enumerate(values)), 'points', ('f',))) == [
        'x', '3.00 +- 1.00 points', '3', '0.035', '0.52 to 5.48', 'f']
    half = 4.3027 * statistics.stdev(values) / 3 ** 0.5
    assert interval(values) == f'{3 - half:.2f} to {3 + half:.2f}' and interval(values[:2]) == '-'
    assert line('x', Difference({0: 2.0, 1: 2.01, 2: 2.02}, '%', tuple('abcde')))[3:] == ['**< 0.0001**', '1.99 to 2.03', 'a to e']


def test_a_stored_file_that_is_damaged_is_named(tmp_path, monkeypatch):
    (tmp_path / 'cut.json').write_text('{')
    monkeypatch.setattr(claims, 'STORED', tmp_path)
    for name in ('cut', 'gone'):
        with pytest.raises(UserError, match=f'{name}.json is missing or damaged; git checkout restores it'):
            claims.stored(name)


def test_the_command_prints_every_section_and_seed(capsys):
    claims.main(['--per-seed'])
    said = capsys.readouterr().out
    assert all(f'{title}\n\n| ' in said for title in (*SECTIONS, BEST, STORED_FILES))
    assert 'CamVid, fine-tuning against the same network from random weights: -2.72, -1.86, -1.55' in said
