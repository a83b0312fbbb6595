"""Layers and whole models with hand-derived adjoints, losses, optimisers: on NumPy arrays in flat dicts."""

from fpnumba.nn import schedules
from fpnumba.nn.basic import Embedding, LayerNorm, Linear, RMSNorm, ShortConv, SwiGLU
from fpnumba.nn.diagnostics import GradientDiagnostics, gradient_diagnostics
from fpnumba.nn.fpmamba import FPMamba, FPMamba2
from fpnumba.nn.fprnn import FPRNN
from fpnumba.nn.losses import accuracy, cross_entropy, cross_entropy_vjp
from fpnumba.nn.lstm import LSTM
from fpnumba.nn.mamba import Mamba
from fpnumba.nn.model import Model
from fpnumba.nn.official import from_official
from fpnumba.nn.optim import AdamW, global_norm

__all__ = [
    "FPRNN",
    "LSTM",
    "AdamW",
    "Embedding",
    "FPMamba",
    "FPMamba2",
    "GradientDiagnostics",
    "LayerNorm",
    "Linear",
    "Mamba",
    "Model",
    "RMSNorm",
    "ShortConv",
    "SwiGLU",
    "accuracy",
    "cross_entropy",
    "cross_entropy_vjp",
    "from_official",
    "global_norm",
    "gradient_diagnostics",
    "schedules",
]
