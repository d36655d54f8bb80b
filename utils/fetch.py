"""Reading numbers from a GPU without waiting for the work that it was given since."""
import torch


class Fetched:
    """The values of 0-d tensors of one device, {name: tensor}, on their way to the CPU.

    `read` waits only until they are computed. `.item()` would wait for all that the GPU was given since, such as
    the next batch.
    """

    def __init__(self, values):
        together, self.names, self.copied = torch.stack(list(values.values())), list(values), None
        cuda = together.device.type == 'cuda'
        self.values = together.to('cpu', non_blocking=cuda)     # from a GPU to pinned memory
        if cuda:
            self.copied = torch.cuda.Event()
            self.copied.record()

    def read(self):
        """{name: float}."""
        if self.copied:
            self.copied.synchronize()
        return dict(zip(self.names, map(float, self.values)))
