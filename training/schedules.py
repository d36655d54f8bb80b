"""Learning-rate schedules: the factor on the rate after `done` of `epochs` epochs."""


def poly(done, epochs):
    """The published decay, (1 - done / epochs)^0.9."""
    return (1 - done / epochs) ** 0.9


def one_cycle(done, epochs):
    """Rises linearly over the first quarter of the epochs, then falls linearly (Smith and Topin, arXiv 1708.07120)."""
    rise = epochs // 4
    return (done + 1) / (rise + 1) if done < rise else (epochs - done) / (epochs - rise)


SCHEDULES = {'poly': poly, 'one-cycle': one_cycle}
