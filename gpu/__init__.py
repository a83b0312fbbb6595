"""The GPU room, still empty: this version of fpnumba has no GPU kernels.

Its doors (``scan``, ``mixers``, ``solve``) will be the ones of `fpnumba.reference` and `fpnumba.cpu`. Until
then asking for one raises `NotImplementedError`, and arrays on a GPU are refused wherever they arrive:
nothing is ever moved to the CPU behind the caller's back.
"""

MESSAGE = (
    "this version of fpnumba has no GPU kernels, so CuPy arrays and other arrays on a GPU are refused; "
    "move them to the CPU first (cupy.asnumpy(x), x.cpu(), jax.device_get(x))"
)
