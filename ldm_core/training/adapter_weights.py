"""Low-rank adapters as weights by name: averaged alone, merged, and as files that peft reads.

`ldm_core.training.lora` puts them on a network. A layer X then has its own weight W under
X.base_layer.weight, and A (r, in) and B (out, r) under X.lora_A.default.weight and X.lora_B….
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from ldm_core.files import exists, join, read_bytes, read_json, write_bytes, write_json

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # as peft calls them
_A, _B, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."
_THEIRS = "base_model.model."  # before every name in peft's files


class AdaptersOf(nn.Module):
    """A network as an average of its adapters alone sees it: `Ema(AdaptersOf(network), 0.999)`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._of = (network,)  # in a tuple: it is no part of this one

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """The adapters' weights, by their names in the network."""
        return apart(self._of[0].state_dict())[1]


def apart(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A network's state as it would be without adapters, and the adapters'."""
    adapters = {name: weight for name, weight in state.items() if name.endswith((_A, _B))}
    plain = {
        name.replace(_BASE, "."): weight for name, weight in state.items() if name not in adapters
    }
    return plain, adapters


def with_added(
    weights: Mapping[str, Tensor], adapters: Mapping[str, Tensor], scale: float
) -> dict[str, Tensor]:
    """W + scale B A for every layer with an adapter, computed in float64 and rounded once.

    Hu et al. 2021, Eq. 3. With -scale, what was added is taken off again, to rounding.

    Args:
        weights: of the network without adapters, by name.
        adapters: by their names in the network.
        scale: alpha / r.
    """
    added = dict(weights)
    for name, a in adapters.items():
        if name.endswith(_A):
            layer = name.removesuffix(_A)
            own, b = added[f"{layer}.weight"], adapters[f"{layer}{_B}"]
            moved = own.double() + scale * b.double() @ a.double()
            added[f"{layer}.weight"] = moved.to(own.dtype)
    return added


@dataclass(frozen=True)
class Adapters:
    """Adapters that belong together.

    Attributes:
        weights: by their names in the network.
        rank, alpha: as `add_lora` was given them.
        base: the model they are added to, for whoever reads it.
    """

    weights: Mapping[str, Tensor]
    rank: int
    alpha: int
    base: str

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank

    def save(self, uri: str) -> None:
        """Write them in peft's layout to a folder or remote prefix, the configuration last.

        `peft.PeftModel.from_pretrained(network, folder)` reads it. Attention here multiplies what
        it only reads with W alone under peft's own layers: merge before use (`merge_and_unload`).
        """
        layers = sorted(name.removesuffix(_A) for name in self.weights if name.endswith(_A))
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": self.base,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": layers,
            "inference_mode": True,
        }
        named = {
            _THEIRS + name.replace(".default.", "."): weight.contiguous()
            for name, weight in self.weights.items()
        }
        write_bytes(join(uri, WEIGHTS), safetensors.torch.save(named, metadata={"format": "pt"}))
        write_json(join(uri, CONFIG), config)


def load_adapters(uri: str) -> Adapters | None:
    """What `Adapters.save` wrote to `uri`; None if there is nothing."""
    if not exists(join(uri, CONFIG)):
        return None
    config: Mapping[str, Any] = read_json(join(uri, CONFIG))
    stored = safetensors.torch.load(read_bytes(join(uri, WEIGHTS)))
    weights = {
        name.removeprefix(_THEIRS).replace(".weight", ".default.weight"): weight
        for name, weight in stored.items()
    }
    base = str(config["base_model_name_or_path"])
    return Adapters(weights, config["r"], config["lora_alpha"], base)
