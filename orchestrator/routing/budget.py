"""A budget for extra work: at most a share of the asks, with a reserve for bad moments. Pure.

Retries, resumes and hedges each have one, so that a fleet in trouble is not drowned in its own
attempts to help (gRFC A6, retry throttling).
"""


class Budget:
    """Every ask earns `share` of an extra; at most `reserve` extras are saved up.

    Args:
        share: extras for each ask, such as 0.1.
        reserve: extras at the start, and the most that can be saved.
    """

    def __init__(self, share: float, reserve: float) -> None:
        self._share = share
        self._reserve = reserve
        self._saved = reserve

    def earn(self) -> None:
        """An ask has come in."""
        self._saved = min(self._reserve, self._saved + self._share)

    def spend(self, keep: float = 0.0) -> bool:
        """Take one extra; False if none is left.

        Args:
            keep: the fraction of the reserve that is left to those who need it more.
        """
        if self._saved < 1 + keep * self._reserve:
            return False
        self._saved -= 1
        return True
