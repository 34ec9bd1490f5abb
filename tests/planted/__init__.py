"""Faults, planted to see whether the tests can fail.

Transforms, estimators and norms with one bug each, for tests of the judges themselves; and in
`faults` faults of the package's own lines, which `python -m tests.planted` plants in a copy.
"""
