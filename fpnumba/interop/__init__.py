"""The neighbours: one thin file for each library whose arrays or schedulers fpnumba meets.

A file that exchanges arrays has three functions, the ones of `fpnumba.arrays.Neighbour`: ``dtype_name``,
``take`` and ``give``. It is imported when the first array of its library arrives, so no neighbour is a
dependency.
"""
