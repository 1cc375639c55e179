"""Before the first request: what a model's layers will call (`prepare`), compiled and tuned (`warmup`)."""

from torch_mamba_ops.startup.compiles import Compiles, count_compiles
from torch_mamba_ops.startup.preparing import Planned, Report, prepare
from torch_mamba_ops.startup.warming import WarmupReport, warmup

__all__ = ["Compiles", "Planned", "Report", "WarmupReport", "count_compiles", "prepare", "warmup"]
