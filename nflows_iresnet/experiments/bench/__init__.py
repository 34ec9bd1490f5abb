"""The command `nflows-iresnet bench`: what does each library's work cost, side by side?

`items.ITEMS` is the dictionary of measurements, `items.STEP_MODELS` that of models. One line in
either adds to every table, picture and file of results.
"""
