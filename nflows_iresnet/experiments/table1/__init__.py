"""The command `nflows-iresnet table1`: what does a guaranteed inverse cost a classifier?"""
