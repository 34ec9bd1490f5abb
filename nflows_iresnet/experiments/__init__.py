"""The command `nflows-iresnet`: comparisons, benchmarks, the tables of the paper, and figures.

`models.MODELS` is the dictionary of models. Plotting and progress libraries are imported only when
the command runs, so importing this package costs nothing.
"""
