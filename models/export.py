"""Writes a checkpoint in the key layout of the published code.

    python -m mdil export runs/mdil/step2-BDD/model_best.pth.tar out.pth.tar

Adapter models keep their keys under `module.`; plain networks become the published
single-task (decoder), fine-tune (decoder_old, decoder_new) or multi-task (decoder.N)
layout. A network that the published code does not have is refused.
"""
from mdil.models import get_method
from mdil.models.checkpoint import load_network, read_checkpoint, save
from mdil.models.layouts import published_keys
from mdil.utils.errors import UserError, run_main
from mdil.utils.files import check_writable
from mdil.utils.parser import Parser


def parse(argv=None):
    parser = Parser(prog='python -m mdil export', description='Writes a checkpoint in the published key layout.')
    parser.add_argument('state', help='a checkpoint of train.py')
    parser.add_argument('out', help='the file to write')
    return parser.parse_args(argv)


def main(argv=None):
    options = parse(argv)
    check_writable('OUT', options.out, inputs=[options.state])
    checkpoint = read_checkpoint(options.state)
    model = load_network(checkpoint)
    method = checkpoint.method or 'mdil'
    row, counts = get_method(method), checkpoint.found.num_classes
    if row.adapter == 'series' or row.domain_bn != (row.adapter is not None):
        raise UserError(f'{options.state}: the published code has no network of --method {method}')
    keys = published_keys(model.state_dict(), counts, row.adapter, multi_task=row.joint)
    save({'epoch': int(checkpoint.content.get('epoch', 0)), 'arch': 'ERFNet', 'state_dict': keys,
          'best_acc': float(checkpoint.content.get('best_acc', 0))}, options.out)
    print(f'{options.out}: {checkpoint.found.kind}, {len(keys)} tensors, e.g. {next(iter(keys))}')


if __name__ == '__main__':
    run_main(main)
