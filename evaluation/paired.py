"""Student's t test for two sets of results paired by seed. We call a difference "better" only if p < 0.01."""
import math
import statistics

LIMIT = 0.01


def p_value(differences):
    """Two-sided p of a paired t test, from the differences of the pairs; None with fewer than two pairs."""
    if len(differences) < 2:
        return None
    mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
    if deviation == 0:
        return 0.0 if mean else 1.0
    return 1 - student(abs(mean) / deviation * math.sqrt(len(differences)), len(differences) - 1)


def student(t, freedom):
    """P(|T| <= t) for Student's t with `freedom` degrees of freedom; Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    odd, angle = freedom % 2, math.atan(t / math.sqrt(freedom))
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def verdict(differences):
    """'better' or 'worse' if p < LIMIT, else ''."""
    p = p_value(differences)
    return '' if p is None or p >= LIMIT else 'better' if statistics.fmean(differences) > 0 else 'worse'
