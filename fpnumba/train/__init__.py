"""Training, small but real: configuration, loop, checkpoints, evaluation, pictures."""

from fpnumba.train.build import build_model, initial_params, load_run
from fpnumba.train.checkpoint import Checkpoint, CheckpointError
from fpnumba.train.config import PRESETS, Config, ConfigError, preset
from fpnumba.train.evaluation import CUTS, baseline_of, evaluate, table
from fpnumba.train.extras import MissingExtra, need_all
from fpnumba.train.folder import Folder, RunError
from fpnumba.train.loop import Outcome, TrainingError, run
from fpnumba.train.parallel import Group, ParallelError, group
from fpnumba.train.pictures import plot
from fpnumba.train.several import compare
from fpnumba.train.solves import compare_ways, iteration_map, plot_iterations, plot_ways
from fpnumba.train.weights import Imported, WeightsError, import_weights, load_weights

__all__ = [
    "CUTS",
    "PRESETS",
    "Checkpoint",
    "CheckpointError",
    "Config",
    "ConfigError",
    "Folder",
    "Group",
    "Imported",
    "MissingExtra",
    "Outcome",
    "ParallelError",
    "RunError",
    "TrainingError",
    "WeightsError",
    "baseline_of",
    "build_model",
    "compare",
    "compare_ways",
    "evaluate",
    "group",
    "import_weights",
    "initial_params",
    "iteration_map",
    "load_run",
    "load_weights",
    "need_all",
    "plot",
    "plot_iterations",
    "plot_ways",
    "preset",
    "run",
    "table",
]
