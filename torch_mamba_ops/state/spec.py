"""What one layer keeps between tokens: shapes, dtypes and memory layout of its window and of its SSM state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack

import torch

from torch_mamba_ops.ops.checks import FLOATING, canonical_activation
from torch_mamba_ops.settings import ROUNDED, current

KINDS = ("mamba1", "mamba2", "short_conv")
LAYOUTS = ("SD", "DS")


class Options(TypedDict, total=False):
    """What every way to make a `MambaStateSpec` takes.

    Attributes:
        tensor_parallel_size: ranks that the layer is split over, 1 by default. Heads (channels of Mamba1 and of the
            short convolution) are split; groups are split if the size divides them, and else each rank has the one
            group that its heads use.
        conv_dtype: of the window; by default the configuration's dtype, else torch's default.
        conv_layout: ``"SD"`` or ``"DS"``, in any case; by default as `torch_mamba_ops.settings` say.
        speculative_tokens: drafts a step, 0 by default; the window gets as many columns more.
        ssm_dtype: of the SSM state; by default the configuration's, else float32.
        stochastic_rounding: whether the SSM state is rounded stochastically; by default as the settings say.
        philox_rounds: of the generator for that; by default as the settings say.
    """

    tensor_parallel_size: int
    conv_dtype: torch.dtype | str | None
    conv_layout: str | None
    speculative_tokens: int
    ssm_dtype: torch.dtype | str | None
    stochastic_rounding: bool | None
    philox_rounds: int | None


@dataclass(frozen=True)
class MambaStateSpec:
    """One layer's states on one tensor-parallel rank. Compares and hashes by value.

    Made by `from_config`, by `mamba1`, `mamba2` or `short_conv`, or from the fields, which are those of the rank.

    Attributes:
        kind: ``"mamba1"``, ``"mamba2"`` or ``"short_conv"``.
        conv_dim: channels of the convolution. Mamba2: ``heads * head_dim + 2 * groups * state_size``.
        conv_width: taps of the filter.
        conv_dtype: of the window.
        conv_layout: memory of a pool of windows, ``"SD"`` ``[slots, columns, dim]`` or ``"DS"``
            ``[slots, dim, columns]``. Operations take ``[slots, dim, columns]`` either way.
        speculative_tokens: drafts a step; the window has ``conv_width - 1 + speculative_tokens`` columns.
        heads: of Mamba2, else 1.
        head_dim: channels of a head; of Mamba1 and of the short convolution all channels.
        groups: of B and C.
        state_size: numbers a channel; 0 for the short convolution, which has no SSM state.
        ssm_dtype: of the SSM state.
        chunk_size: of Mamba2's scan; None for the others.
        activation: after the convolution, ``"silu"`` or None.
        stochastic_rounding: whether the SSM state, float16 or bfloat16, is rounded stochastically.
        philox_rounds: of the generator for that.

    Raises:
        ValueError: a field is not one of the valid values, or fields do not fit together.
        TypeError: a dtype is none.
    """

    kind: Literal["mamba1", "mamba2", "short_conv"]
    conv_dim: int
    conv_width: int
    conv_dtype: torch.dtype = torch.float32
    conv_layout: Literal["SD", "DS"] = "SD"
    speculative_tokens: int = 0
    heads: int = 1
    head_dim: int = 1
    groups: int = 1
    state_size: int = 0
    ssm_dtype: torch.dtype = torch.float32
    chunk_size: int | None = None
    activation: str | None = "silu"
    stochastic_rounding: bool = False
    philox_rounds: int = 10

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, KINDS)
        _one_of("conv_layout", self.conv_layout, LAYOUTS)
        for name in ("conv_dtype", "ssm_dtype"):
            if getattr(self, name) not in FLOATING:
                raise TypeError(f"{name}: got {getattr(self, name)}, expected one of {', '.join(map(str, FLOATING))}")
        object.__setattr__(self, "activation", canonical_activation(self.activation))
        smallest = {"speculative_tokens": 0, "conv_width": 2, "state_size": 0 if self.kind == "short_conv" else 1}
        for name in ("conv_dim", "heads", "head_dim", "groups", "philox_rounds", *smallest):
            _at_least(name, getattr(self, name), smallest.get(name, 1))
        if self.chunk_size is not None:
            _at_least("chunk_size", self.chunk_size, 1)
        if self.heads % self.groups:
            raise ValueError(f"groups: got {self.groups}, expected a number that divides the {self.heads} heads")
        channels = self.heads * self.head_dim + (2 * self.groups * self.state_size if self.kind == "mamba2" else 0)
        if self.conv_dim != channels:
            sizes = f"heads {self.heads}, head_dim {self.head_dim}, groups {self.groups}, state_size {self.state_size}"
            raise ValueError(f"conv_dim: got {self.conv_dim}, expected {channels} for {self.kind} with {sizes}")
        if self.kind != "mamba2" and self.heads != 1:
            raise ValueError(f"heads: got {self.heads}, expected 1 for {self.kind}, whose channels are head_dim")
        if self.kind == "short_conv" and self.state_size:
            raise ValueError(f"state_size: got {self.state_size}, expected 0 for short_conv, which has no SSM state")
        if self.stochastic_rounding and (self.kind == "short_conv" or self.ssm_dtype not in ROUNDED):
            given = "no SSM state" if self.kind == "short_conv" else f"an SSM state of {self.ssm_dtype}"
            raise ValueError(f"stochastic_rounding: got True with {given}, expected {' or '.join(map(str, ROUNDED))}")

    @property
    def columns(self) -> int:
        """Inputs that a window holds."""
        return self.conv_width - 1 + self.speculative_tokens

    @property
    def conv_shape(self) -> tuple[int, int]:
        """``(conv_dim, columns)`` of one window, whatever the layout."""
        return self.conv_dim, self.columns

    @property
    def ssm_shape(self) -> tuple[int, ...] | None:
        """Of one SSM state: ``(heads, head_dim, state_size)``, Mamba1 ``(head_dim, state_size)``, short_conv None."""
        if self.kind == "short_conv":
            return None
        inner = (self.head_dim, self.state_size)
        return (self.heads, *inner) if self.kind == "mamba2" else inner

    @classmethod
    def mamba2(
        cls,
        heads: int,
        head_dim: int,
        state_size: int,
        *,
        groups: int = 1,
        conv_width: int = 4,
        chunk_size: int = 256,
        activation: str | None = "silu",
        **options: Unpack[Options],
    ) -> MambaStateSpec:
        """A Mamba2 layer from the sizes of the whole layer; see `Options` for the rest, which raises what they say.

        Raises:
            ValueError: the heads cannot be split over the ranks, or as the class does.
        """
        ranks = _ranks(options)
        own_heads = _split("heads", heads, ranks)
        if heads % groups:
            raise ValueError(f"groups: got {groups}, expected a number that divides the {heads} heads")
        if groups % ranks and ranks % groups:
            expected = "a number that divides tensor_parallel_size, or that it divides"
            raise ValueError(f"groups: got {groups} with tensor_parallel_size {ranks}, expected {expected}")
        own_groups = max(1, groups // ranks)
        return cls(
            "mamba2",
            own_heads * head_dim + 2 * own_groups * state_size,
            conv_width,
            heads=own_heads,
            head_dim=head_dim,
            groups=own_groups,
            state_size=state_size,
            chunk_size=chunk_size,
            activation=activation,
            **_resolved(options),
        )

    @classmethod
    def mamba1(
        cls,
        channels: int,
        state_size: int,
        *,
        conv_width: int = 4,
        activation: str | None = "silu",
        **options: Unpack[Options],
    ) -> MambaStateSpec:
        """A Mamba1 layer from the sizes of the whole layer; see `mamba2`."""
        own = _split("channels", channels, _ranks(options))
        return cls(
            "mamba1", own, conv_width, head_dim=own, state_size=state_size, activation=activation, **_resolved(options)
        )

    @classmethod
    def short_conv(
        cls, channels: int, *, conv_width: int = 3, activation: str | None = None, **options: Unpack[Options]
    ) -> MambaStateSpec:
        """A short convolution (LFM2), which has a window and no SSM state; see `mamba2`."""
        own = _split("channels", channels, _ranks(options))
        given: Options = {**options, "stochastic_rounding": options.get("stochastic_rounding") or False}
        return cls("short_conv", own, conv_width, head_dim=own, activation=activation, **_resolved(given))

    @classmethod
    def from_config(cls, config: Any, **options: Unpack[Options]) -> dict[int, MambaStateSpec]:
        """The specs of a Hugging Face model's layers.

        Args:
            config: a configuration object, or the dictionary that its ``config.json`` holds, of bamba, falcon_h1,
                falcon_mamba, granitemoehybrid, jamba, lfm2, lfm2_moe, mamba, mamba2, nemotron_h or zamba2.
            **options: see `Options`.

        Returns:
            Layer index -> spec, without the layers that keep no such state; empty for a model that has none.

        Raises:
            ValueError: a model with Mamba layers that is not one of these, or an option or size that does not fit.
        """
        from .configs import layers

        return layers(cls, config, options)


def _ranks(options: Options) -> int:
    ranks = options.get("tensor_parallel_size", 1)
    _at_least("tensor_parallel_size", ranks, 1)
    return ranks


def _split(name: str, count: int, ranks: int) -> int:
    if count % ranks:
        raise ValueError(f"tensor_parallel_size: got {ranks}, expected a number that divides the {count} {name}")
    return count // ranks


def _resolved(options: Options) -> dict[str, Any]:
    """The fields that the options stand for: what is not given is as the settings say."""
    settings = current()

    def given(name: str, otherwise: Any) -> Any:
        value: Any = options.get(name)
        return otherwise if value is None else value

    layout = given("conv_layout", settings.conv_state_layout)
    return {
        "conv_dtype": dtype_of("conv_dtype", given("conv_dtype", torch.get_default_dtype())),
        "conv_layout": layout.upper() if isinstance(layout, str) else layout,
        "speculative_tokens": given("speculative_tokens", 0),
        "ssm_dtype": dtype_of("ssm_dtype", given("ssm_dtype", torch.float32)),
        "stochastic_rounding": given("stochastic_rounding", settings.stochastic_rounding),
        "philox_rounds": given("philox_rounds", settings.philox_rounds),
    }


def dtype_of(name: str, given: torch.dtype | str) -> torch.dtype:
    """A dtype, also from its name, ``"bfloat16"``."""
    by_name: Mapping[str, torch.dtype] = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATING}
    found: Any = by_name.get(given.removeprefix("torch.")) if isinstance(given, str) else given
    if found not in FLOATING:
        raise ValueError(f"{name}: got {given!r}, expected one of {', '.join(by_name)}")
    return found


def _one_of(name: str, value: Any, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, valid))}")


def _at_least(name: str, value: Any, smallest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
        raise ValueError(f"{name}: got {value!r}, expected an integer of at least {smallest}")


__all__ = ["MambaStateSpec", "Options"]
