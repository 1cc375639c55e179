"""The text of Triton functions, for templates that are text themselves."""

from __future__ import annotations

import inspect
from typing import Any

from torch_mamba_ops.ops.tiles import LOG2_E


def source_of(*functions: Any) -> str:
    """The source of Triton functions, of those that they call and of the constants that they read, each once; safe from
    the template's own language."""
    waiting, texts = list(functions), dict[str, str]()
    while waiting:
        function = waiting.pop(0)
        if function.__name__ not in texts:
            texts[function.__name__] = inspect.getsource(function.fn)
            for name in function.fn.__code__.co_names:
                value = function.fn.__globals__.get(name)
                if isinstance(value, type(LOG2_E)):
                    texts[name] = f"{name} = tl.constexpr({value.value!r})"
                elif isinstance(value, type(function)):
                    waiting.append(value)
    return "{% raw %}\n\n" + "\n\n".join(texts.values()) + "{% endraw %}\n"
