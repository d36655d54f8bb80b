"""CUDA graphs: the kernels of a function, recorded once and replayed as a single launch.

A batch of this network takes about two thousand small kernels; on a fast GPU the processor needs
longer to launch them than the GPU to run them.
"""
import torch

from mdil.utils.errors import UserError, brief

EAGER = 2       # calls before recording: cuDNN chooses its algorithms, torch.compile writes its kernels


def graphed(work, place):
    """`work` itself, or wrapped in Graphed if the place uses CUDA graphs."""
    return Graphed(work) if place.graphs else work


class Graphed:
    """`work` on one GPU, recorded for each form of its arguments and replayed from the third call on.

    form: the shapes of tensor arguments and the values of all others. work: must not change its
    tensor arguments, which are on the GPU, nor wait for the GPU; returns a tensor, or a tuple or
    dict of tensors. Every call runs it exactly once, so it may train, but anything else that it
    reads in Python, such as a learning rate, stays as recorded. The next call overwrites the output.
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
        """Runs the work on the stream that is recorded later, so that autograd's state belongs to that stream."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            output = self.work(*arguments)
        torch.cuda.current_stream().wait_stream(self.stream)
        return output

    def record(self, arguments):
        """(graph, its own copies of the arguments, its output) for arguments of this form; computes nothing yet."""
        graph = torch.cuda.CUDAGraph()
        own = [argument.clone() if isinstance(argument, torch.Tensor) else argument for argument in arguments]
        torch.cuda.synchronize()
        try:
            # By default, recording fails if any thread calls CUDA; a loader's thread pins memory meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode='thread_local'):
                output = self.work(*own)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(f'this step cannot be recorded as a CUDA graph ({brief(error, 200)}); '
                            'leave out --cuda-graphs') from error
        return graph, own, output
