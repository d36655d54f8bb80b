"""Methods beside each other: step x domain matrices, and a picture of what each predicts.

    python -m utils.compare ours=runs/demo/ours fine-tune=runs/demo/fine-tune \\
        --data-root DATA --out runs/demo

Reads the `results.json` that eval.py wrote into each folder, prints the matrices, writes
`comparison.md` and `comparison.png` (input, truth, one column for each method) into --out.
"""
import json
from pathlib import Path

from datasets import SegmentationDataset, get_domain
from utils import pictures, tables
from utils.checkpoint import load_network, read_checkpoint, write_atomically
from utils.errors import UserError, run_main
from utils.options import Parser, data_options, data_paths
from utils.parallel import pick_device


def parse(argv=None):
    parser = Parser(prog='python -m utils.compare', description='Compares evaluated sequences.')
    parser.add_argument('results', nargs='+', metavar='NAME=FOLDER', help='folders with a results.json of eval.py')
    parser.add_argument('--out', required=True, metavar='DIR', help='where the table and the picture go')
    parser.add_argument('--device', default='auto', help='device that draws the predictions')
    data_options(parser)
    return parser.parse_args(argv)


def read_results(items):
    """{name: content of results.json} of NAME=FOLDER items."""
    results = {}
    for item in items:
        name, _, folder = item.partition('=')
        path = Path(folder) / 'results.json'
        try:
            results[name] = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f'{item}: {path} cannot be read ({error}); eval.py --json writes it') from None
    if len({tuple(result['domains']) for result in results.values()}) > 1:
        raise UserError('the folders hold different domains or orders; compare like with like')
    return results


def matrix(result):
    """[{domain: mIoU}] after each step."""
    return [{name: entry['miou'] for name, entry in step['domains'].items()} for step in result['steps']]


def summary_rows(results):
    """Header and rows: forgetting of every earlier domain and the mean mIoU of each method."""
    old = list(next(iter(results.values()))['summary']['forgetting'])
    header = ['method', *(f'forgotten of {name}' for name in old), 'mean mIoU']
    rows = [[name, *(tables.number(result['summary']['forgetting'][domain]) for domain in old),
             tables.number(sum(e['miou'] for e in result['domains'].values()) / len(result['domains']))]
            for name, result in results.items()]
    return header, rows


def report(results):
    """(text for the terminal, Markdown) of all results."""
    blocks = [f'{name}\n{tables.plain(*tables.step_rows(matrix(result)))}' for name, result in results.items()]
    text = blocks[0]
    for block in blocks[1:]:
        text = tables.side_by_side(text, block)
    text += '\n\n' + tables.plain(*summary_rows(results))
    first = next(iter(results.values()))
    protocol, versions = first['protocol'], first['versions']
    about = (f'mIoU in percent over the non-void classes at {protocol["width"]}x{protocol["height"]}, split '
             f'{protocol["split"]}; torch {versions["torch"]} on {versions["device"]}, revision {versions["git"]}.')
    parts = [about] + [f'**{name}**\n\n{tables.markdown(*tables.step_rows(matrix(result)))}'
                       for name, result in results.items()]
    return text, '\n\n'.join(parts + [tables.markdown(*summary_rows(results))]) + '\n'


def draw(results, options):
    """Writes the picture from each sequence's last checkpoint."""
    protocol = next(iter(results.values()))['protocol']
    device, paths, models = pick_device(options.device), data_paths(options.data), {}
    for name, result in results.items():
        models[name] = load_network(read_checkpoint(result['steps'][-1]['state'])).to(device)
    size = protocol['height'], protocol['width']
    sets = [SegmentationDataset(get_domain(domain, paths), options.data_root, protocol['split'], size)
            for domain in next(iter(results.values()))['domains']]
    pictures.save_panels(Path(options.out) / 'comparison.png', sets, models, device)


def main(argv=None):
    options = parse(argv)
    results = read_results(options.results)
    text, table = report(results)
    Path(options.out).mkdir(parents=True, exist_ok=True)
    write_atomically(Path(options.out) / 'comparison.md', lambda file: file.write(table.encode()))
    draw(results, options)
    print(text)
    print(f'\nwritten: {options.out}/comparison.md, {options.out}/comparison.png')


if __name__ == '__main__':
    run_main(main)
