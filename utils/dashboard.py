"""Live curves in visdom, for runs with --port."""
import sys


class Dashboard:
    """Sends each epoch's numbers to a visdom server; silent without --port.

    visdom is imported only when asked for; a server that is not there costs one
    warning and training goes on.
    """

    def __init__(self, options):
        self.vis = None
        self.env = (options.model_name_suffix or options.method) + '-' + '-'.join(options.domains)
        if options.port is None:
            return
        try:
            import visdom
            self.vis = visdom.Visdom(server=options.server, port=options.port, env=self.env, raise_exceptions=True)
        except ImportError:
            self.give_up('visdom is not installed')
        except Exception as error:      # visdom raises whatever its HTTP client does
            self.give_up(f'no visdom server at {options.server}:{options.port} ({type(error).__name__})')

    def give_up(self, reason):
        self.vis = None
        print(f'live curves are off: {reason}', file=sys.stderr)

    def show(self, line):
        """Appends a line of metrics.jsonl to the curves."""
        if self.vis is None:
            return
        train = dict(line['train'])
        curves = {'images/s': {'images/s': train.pop('images_per_second')}, 'losses': train,
                  'mIoU': {name: entry['miou'] for name, entry in line['val'].items()},
                  'validation loss': {name: entry['loss'] for name, entry in line['val'].items()}}
        try:
            for title, values in curves.items():
                for name, value in values.items():
                    self.vis.line(X=[line['epoch']], Y=[value], win=title, name=name, update='append',
                                  opts={'title': title, 'showlegend': True})
        except Exception as error:      # as above
            self.give_up(f'visdom went away ({type(error).__name__})')
