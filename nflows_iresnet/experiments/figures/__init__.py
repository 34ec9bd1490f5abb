"""The command `nflows-iresnet figures`: pictures of what the method does, all of them computed.

`catalogue.FIGURES` is the dictionary of pictures. One line in it adds to the page and to the file
of numbers.
"""
