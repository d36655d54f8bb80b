"""CUDA graphs: the kernels of a piece of work, recorded once and replayed as one launch.

A batch of this network is some two thousand small kernels; on a fast card the processor takes
longer to launch them than the card to run them.
"""
import torch

from mdil.utils.errors import UserError

EAGER = 2       # calls before recording: cuDNN chooses its algorithms, torch.compile writes its kernels


def graphed(work, place):
    """`work` as it is, or as a Graphed where the place has graphs."""
    return Graphed(work) if place.graphs else work


class Graphed:
    """`work` on one GPU, recorded for each form of its arguments and replayed from the third call on.

    work: a function of tensors on the GPU, which it may not change, and of other values. It
    returns a tensor, or a tuple or dict of tensors, and never waits for the GPU. It runs once
    for each call, so it may train; whatever else it reads in Python (a learning rate) stays
    as it was when recorded. What a call returns is overwritten by the next one.
    """

    def __init__(self, work):
        self.work, self.calls, self.graphs = work, {}, {}
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, *arguments):
        form = tuple(getattr(argument, 'shape', argument) for argument in arguments)
        self.calls[form] = self.calls.get(form, 0) + 1
        if self.calls[form] <= EAGER:
            return self.eager(arguments)
        if form not in self.graphs:
            self.graphs[form] = self.record(arguments)
        graph, own, output = self.graphs[form]
        for inside, given in zip(own, arguments):
            if isinstance(given, torch.Tensor):
                inside.copy_(given)
        graph.replay()
        return output

    def eager(self, arguments):
        """Runs the work on the stream that will be recorded, so that autograd's own state belongs to it."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            output = self.work(*arguments)
        torch.cuda.current_stream().wait_stream(self.stream)
        return output

    def record(self, arguments):
        """(graph, its arguments, its output) of the work on arguments of this form; nothing is computed yet."""
        graph = torch.cuda.CUDAGraph()
        own = [argument.clone() if isinstance(argument, torch.Tensor) else argument for argument in arguments]
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                output = self.work(*own)
        except RuntimeError as error:
            raise UserError(f'this step cannot be recorded as a CUDA graph ({" ".join(str(error).split())[:200]}); '
                            'leave out --cuda-graphs') from error
        return graph, own, output
