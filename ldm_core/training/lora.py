"""Low-rank adapters on a network's linear layers, by `peft` (Hu et al. 2021, Eq. 3).

W x + alpha / r B A x, of which only A (r, in) and B (out, r) are trained; B begins at zero, so the
network begins as it was. For export they are added to W. Optimisers and averages are made
afterwards, of `adapters(network)` alone.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ldm_core.errors import UserError

_ATTENTION = ("attention", "image", "text")  # what owns the projections in a block, if not itself
_THEIRS = {  # of diffusers' models
    "to_q", "to_k", "to_v", "to_out", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
}  # fmt: skip


def attention_layers(network: nn.Module) -> list[str]:
    """Names of the layers that make queries, keys and values of tokens, and that mix the results.

    Those Hu et al. 2021 adapt (Sec. 4.2), in every block of a transformer of ours or of diffusers'.
    """

    def is_one(name: str) -> bool:
        owner, own = ["", *name.split(".")][-2:]
        if {own, name.removesuffix(".0").rpartition(".")[2]} & _THEIRS:  # to_out.0, and a dropout
            return True
        return own in ("qkv", "out") and (owner in _ATTENTION or owner.isdigit())

    named = network.named_modules()
    return [name for name, layer in named if isinstance(layer, nn.Linear) and is_one(name)]


def add_lora(
    network: nn.Module, rank: int, alpha: int, targets: Sequence[str] | None = None
) -> None:
    """Put adapters on the linear layers whose names end so, in place; the rest is frozen.

    Needs `peft`. A's draws are those of torch's default generator.

    Args:
        network: with the weights it is to begin with, before it is sharded.
        rank: r.
        alpha: of the scale alpha / r.
        targets: ends of names, such as "attention.qkv" or "mlp.out"; None are the attention's.

    Raises:
        UserError: no layer is called so, or peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import Linear
    except ImportError as error:
        raise UserError("LoRA needs peft, which is not here: pip install peft") from error
    names = attention_layers(network)
    if targets is not None:
        names = [name for name, _ in network.named_modules() if name.endswith(tuple(targets))]
    if not names:
        wanted = ", ".join(targets or ("qkv", "out"))
        raise UserError(
            f"no layer of {type(network).__name__} has a name that ends in {wanted}: "
            "name some of its linear layers as LoRA's targets"
        )
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0)
    config._register_custom_module({nn.Linear: _with_adapted_weight(Linear)})
    # in a box, as peft would take a configuration of ours for one of transformers'
    inject_adapter_in_model(config, nn.ModuleDict({"network": network}))


def _with_adapted_weight(linear: Any) -> type[nn.Module]:
    """Peft's layer, whose `weight` is that of the layer it stands for, and not the frozen one.

    Attention here multiplies what it only reads with some rows of it.
    """

    class AdaptedLinear(linear):  # type: ignore[misc]
        @property
        def weight(self) -> Tensor:
            weight: Tensor = self.get_base_layer().weight
            for adapter in () if self.merged else self.active_adapters:
                weight = weight + self.get_delta_weight(adapter)
            return weight

    return AdaptedLinear


def adapters(network: nn.Module) -> list[Tensor]:
    """What is trained."""
    return [weight for weight in network.parameters() if weight.requires_grad]


def merge_lora(network: nn.Module) -> None:
    """Add the adapters to the layers they are on, in place; the network is a plain one again."""
    from peft.tuners.lora import LoraLayer

    adapted = [(name, m) for name, m in network.named_modules() if isinstance(m, LoraLayer)]
    for name, layer in adapted:
        layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(network.get_submodule(parent), own, layer.get_base_layer())
    network.requires_grad_(True)
