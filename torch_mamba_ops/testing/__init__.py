"""Oracles, cases and checks of the operations; a third-party backend can run them on itself with `check_backend`."""

from torch_mamba_ops.testing.check import assert_right, build, cases, check_backend, copied, oracle, truth

__all__ = ["assert_right", "build", "cases", "check_backend", "copied", "oracle", "truth"]
