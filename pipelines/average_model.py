"""A model directory in memory, and the same with another average of its weights.

    model directory + snapshots of its training -> weights averaged over any length

Of a model that adapters were merged into, the adapters are averaged (`train.lora_rank`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ldm_core.errors import UserError
from ldm_core.files import absolute, exists, join, read_bytes
from ldm_core.model_directory import ModelConfig, load_model
from ldm_core.training.adapter_weights import Adapters, load_adapters, with_added
from ldm_core.training.checkpoint_folder import listing
from ldm_core.training.checkpoint_snapshots import Snapshot, average_of, snapshots_at
from pipelines.teacher_places import ADAPTER, snapshots_place


@dataclass(frozen=True)
class Model:
    """What is exported.

    Attributes:
        uri: of the model directory it is, or was made of.
        digest: of that.
        config: with absolute references.
        weights: of the network, by name.
        adapters: that are merged into them, if any.
        card: of that model directory.
    """

    uri: str
    digest: str
    config: ModelConfig
    weights: Mapping[str, Tensor]
    adapters: Adapters | None
    card: str


def read_model(uri: str) -> Model:
    """The model directory at `uri`.

    Raises:
        UserError: none there.
    """
    config, network, digest = load_model(uri)
    card = join(uri, "README.md")
    text = read_bytes(card).decode() if exists(card) else ""
    adapters = load_adapters(join(uri, ADAPTER))
    return Model(uri, digest, config, network.state_dict(), adapters, text)


def averaged(model: Model, length: float) -> tuple[Model, list[str]]:
    """The model with weights averaged over another length, and what is to be told of them.

    Of a model that adapters were merged into, the adapters are averaged.

    Raises:
        UserError: a student, or no snapshots of the training that made it.
    """
    if model.config.kind != "teacher":
        raise UserError(
            f"{model.uri} is a {model.config.kind}, and only the training of teachers keeps "
            "snapshots: export an average of its teacher, and distil that"
        )
    kept = snapshots_of(model)
    found, error = average_of(kept, length)
    model = _with(model, found, kept[0])
    last, titles = max(int(each.time) for each in kept), sorted({each.title for each in kept})
    lineage = {"averaged_from": model.digest, "average": f"{length:g}"}
    config = model.config.model_copy(update={"lineage": {**model.config.lineage, **lineage}})
    note = (
        f"\nThese weights are those of model `{model.digest}`, averaged over a relative length of "
        f"{length:g} of its training (Karras et al. 2024), out of {len(kept)} snapshots.\n"
    )
    told = (
        f"average {length:g} at step {last} out of {len(kept)} snapshots ({', '.join(titles)}): "
        f"{100 * error:.2g} % from its profile"
    )
    return replace(model, config=config, card=model.card + note), [told]


def snapshots_of(model: Model) -> list[Snapshot]:
    """The snapshots that the training of a teacher left, beside it or where it was made.

    Raises:
        UserError: it kept none, or they are gone.
    """
    kept = model.config.lineage.get("snapshots")
    remedy = "averages of any length are made of those that training keeps with --set "
    remedy += "train.ema_lengths='[0.05, 0.1]': set it and train again"
    if kept is None:
        raise UserError(f"the training of {model.uri} kept no snapshots; {remedy}")
    places = [snapshots_place(absolute(model.uri), kept.rpartition("/")[2]), kept]
    for place in places:
        if listing(place):
            return snapshots_at(place, told=print)
    raise UserError(
        f"the snapshots of {model.uri} are gone, from {' and '.join(dict.fromkeys(places))}: put "
        f"them back; {remedy}"
    )


def _with(model: Model, found: Mapping[str, Tensor], snapshot: Snapshot) -> Model:
    """The model with what was averaged in its place."""
    adapters = model.adapters
    if found.keys() != (adapters.weights if adapters else model.weights).keys():
        raise UserError(
            f"{snapshot.checkpoint.uri} is of another network than {model.uri}: copy a model and "
            "its snapshots together"
        )
    if adapters is None:
        return replace(model, weights=found)
    base = with_added(model.weights, adapters.weights, -adapters.scale)
    weights = with_added(base, found, adapters.scale)
    return replace(model, weights=weights, adapters=replace(adapters, weights=found))
