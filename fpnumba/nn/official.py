"""Weights of the published implementation of Fixed-Point RNNs, brought over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fpnumba.nn.basic import Array, Params
from fpnumba.nn.fpmamba import FPMamba
from fpnumba.nn.fprnn import FPRNN
from fpnumba.nn.mixer_maps import FixedMap
from fpnumba.solve import Adjoint, Solver

MIXERS = {
    "householderproduct": "householder",
    "dplr": "dplr",
    "kronecker": "kronecker",
    "monarch": "monarch",
    "selectivedense": "dense",
    "nonselective": "fixed",
    "mixture": "mixture",
}
BASE = "mixer.q_proj.parametrizations.weight.0.base"


Official = FPRNN | FPMamba

# The share of a batch that the published training does not wait for, by class.
OUTLIERS = {"FPRNN": 0.1, "FPMamba": 0.25}


def from_official(config: Mapping[str, Any], state: Mapping[str, Array]) -> tuple[Official, Params]:
    """Make a layer of the published implementation's weights that behaves as it does.

    Parameters
    ----------
    config : mapping
        ``cls`` ("FPRNN" or "FPMamba"), ``d_model``, ``train`` (default False), ``config``, the constructor's
        arguments by their published names, and ``optimizer``, the settings of its fixed-point loop, where they differ
        from its defaults.
    state : mapping of str to ndarray
        The state dict. Floating point of one dtype, which the layer then computes in.

    Returns
    -------
    layer : FPRNN or FPMamba
        Solves in parallel by the published rule, makes the further applications that the published code
        differentiates, and has its one-step gradient. Set ``layer.solver`` and ``layer.adjoint`` for other
        ways to the same fixed point.
    params : dict of arrays
        The parameters, under their published names.

    Raises
    ------
    ValueError
        For a class or an option that the published code does not have, or parameters that are missing, left
        over, or of another shape.

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba import nn
    >>> config = {"cls": "FPRNN", "d_model": 4, "config": {"mixer_type": "dplr", "mixer_rank": 2}}
    >>> state = nn.FPRNN(4, mixer="dplr", rank=2).init(np.random.default_rng(0), np.float64)
    >>> layer, params = nn.from_official(config, state)
    >>> layer(params, np.ones((1, 3, 4))).shape
    (1, 3, 4)
    """
    name = config.get("cls", "FPRNN")
    if name not in OUTLIERS:
        raise ValueError(f"config names the class {name!r}; this version brings over 'FPRNN' and 'FPMamba'")
    if "d_model" not in config:
        raise ValueError("config must hold 'd_model'")
    options, width = dict(config.get("config", {})), int(config["d_model"])
    cls, theirs = (FPRNN, layer_options) if name == "FPRNN" else (FPMamba, mamba_options)
    layer: Official = cls(width, **theirs(options))
    layer.train_mode = bool(config.get("train", False))
    layer.solver = _solver(name, options, dict(config.get("optimizer", {})))
    # torch.compile wraps a module and so puts a word into the names below it
    params = {key.replace("_orig_mod.", ""): np.array(value) for key, value in state.items()}
    base = params.pop(BASE, None)
    if isinstance(layer.map, FixedMap):
        if base is None:
            raise ValueError(f"state lacks {BASE}, the matrix at which the training of the fixed mixer began")
        layer.map.base = base
    _check(layer, params)
    return layer, params


def shared_options(options: dict[str, Any], kind: str) -> dict[str, Any]:
    """Constructor arguments of either layer from the published ones; `kind` is the default ``mixer_type``."""
    kind = str(options.get("mixer_type", kind)).lower()
    if kind not in MIXERS:
        raise ValueError(f"mixer_type must be one of {', '.join(map(repr, MIXERS))}, not {kind!r}")
    if options.get("use_short_conv", False) and not options.get("conv_bias", True):
        raise ValueError("conv_bias=False is not supported: set the biases to zero instead")
    rank = options.get("mixer_proj_rank")
    return {
        "expand": int(options.get("expand", 2)),
        "mixer": MIXERS[kind],
        "rank": int(options.get("mixer_rank", 1)),
        "symmetric": bool(options.get("symm_mixer", False)),
        "projection_rank": None if rank is None or int(rank) == -1 else int(rank),
        "activation": str(options.get("mixer_ac", "silu")).lower(),
        "short_conv": int(options.get("d_conv", 4)) if options.get("use_short_conv", False) else None,
        "norm_eps": float(options.get("norm_eps", 1e-5)),
        "adjoint": Adjoint("one-step"),
        "n_backwards": int(options.get("n_backwards", 1)),
    }


def layer_options(options: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments of :class:`FPRNN` from the published ones."""
    shared = shared_options(options, "householderproduct")
    own = {
        "d_inner": 256 if shared["mixer"] == "dense" else None,
        "hidden": ("mixer",) if options.get("mixer_h_dep", True) else (),
    }
    return shared | own


def mamba_options(options: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments of :class:`FPMamba` from the published ones.

    The published ``b`` and ``c`` always see the hidden state, and the gate is inside the loop or outside.
    """
    dt_rank = options.get("dt_rank", "auto")
    own = {
        "d_state": int(options.get("d_state", 16)),
        "dt_rank": None if dt_rank == "auto" else int(dt_rank),
        "hidden": ("mixer", "b", "c") if options.get("mixer_h_dep", True) else ("b", "c"),
        "gate": "inside" if options.get("glu_in_loop", False) else "outside",
        "bc_norm": bool(options.get("bc_norm", True)),
        "bias": bool(options.get("bias", False)),
        # the mixers of this class have no spectral normalisation, and what is kept in single precision is used so
        "normalization": "rows",
        "single_rates": True,
    }
    return shared_options(options, "kronecker") | own


def _solver(name: str, options: dict[str, Any], optimizer: dict[str, Any]) -> Solver:
    """The published loop. Its count of iterations is part of the model, so it is silent about not
    converging."""
    damped = name == "FPMamba"
    threshold = optimizer.get("thresh", options.get("convergence_threshold", 0.1))
    return Solver(
        "parallel",
        criterion="published",
        rtol=max(float(threshold), 0.0),
        max_iter=max(int(optimizer.get("max_iter", options.get("max_iter", 100 if damped else 1000))), 1),
        quantile=1.0 - float(optimizer.get("outlier_quantile", OUTLIERS[name])),
        damping=float(optimizer.get("stepsize", 0.99 if damped else 1.0)),
        damping_decay=float(
            optimizer.get("stepsize_decay", options.get("damping_decay_rate", 0.9) if damped else 1.0)
        ),
        damping_patience=int(optimizer.get("decay_patience", 15)),
        on_failure="ignore",
    )


def _check(layer: Official, params: Params) -> None:
    wanted = {name: value.shape for name, value in layer.init(np.random.default_rng(0)).items()}
    missing, extra = sorted(wanted.keys() - params.keys()), sorted(params.keys() - wanted.keys())
    if missing:
        raise ValueError(f"state lacks {', '.join(missing)}")
    if extra:
        raise ValueError(f"state has {', '.join(extra)}, which this configuration does not use")
    for name, shape in wanted.items():
        if params[name].shape != shape:
            raise ValueError(f"state: {name} has shape {params[name].shape}, expected {shape}")
    dtypes = sorted({str(value.dtype) for value in params.values()})
    if dtypes not in (["float32"], ["float64"]):
        raise ValueError(f"state must be float32 or float64 throughout, not {', '.join(dtypes)}")
