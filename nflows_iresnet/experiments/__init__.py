"""The command `nflows-iresnet compare`: which flow wins, at what cost?

`models.MODELS` is the dictionary of models. Plotting and progress libraries are imported only when
the command runs, so importing this package costs nothing.
"""
