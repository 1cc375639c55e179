"""Inductor's part: a decode step becomes a template of Inductor's own, which fuses with what follows it.

Everything that touches `torch._inductor`, whose interfaces are private, is in this package; importing it loads none of
that. See ``docs/inductor.md``.
"""

from .rule import install

install()

__all__: list[str] = []
