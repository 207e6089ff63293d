"""How several workers make one answer: specs, strategies, the arithmetic of fusing. Pure.

A strategy is a generator: it yields commands, is sent one reply at a time, and returns a verdict.
So it is tested with lists, and gateway/ensembles.py, which does what it asks, knows none by name.
"""
