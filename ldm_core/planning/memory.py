"""Memory of one device in a training step, part by part.

P parameters on s shards (Rajbhandari et al. 2020, Sec. 3): 4 P / s bytes each of weights, gradients
and averages, 4 or 8 P / s of the optimiser's moments. Without shards, bfloat16 work on float32
weights takes a copy of all of them, 2 P; with shards, the blocks' weights are gathered one after
another, the next while one computes, and the gradient of one is whole before it is scattered. What
is computed with and what the optimiser works with is not there at the same time. Where adapters
alone are trained, P counts these for all but the weights; what a frozen layer need not keep of its
input is not taken off.
"""

from dataclasses import dataclass, fields

from ldm_core.planning.step import Sample, Step

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        weights: float32, this device's share.
        gradients: float32, its share.
        optimizer: the moments' share.
        averages: float32, the share of all moving averages.
        working: what is gathered or copied of weights and gradients to compute with.
        activations: kept for the backward pass, of one micro-batch's tokens on this device.
        backward: what checkpointing computes again of a block, and the widest gradient.
        update: what Muon orthogonalises, as it is gathered, when activations are gone.
    """

    weights: float
    gradients: float
    optimizer: float
    averages: float
    working: float
    activations: float
    backward: float
    update: float

    @property
    def total(self) -> float:
        """Bytes at the most."""
        state = self.weights + self.gradients + self.optimizer + self.averages
        return state + max(self.working + self.activations + self.backward, self.update)

    def parts(self) -> dict[str, float]:
        """Name -> bytes."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


def memory_of(step: Step) -> Memory:
    """What the bucket that needs most takes."""
    return max((memory_for(step, sample) for sample in step.samples), key=lambda m: m.total)


def memory_for(step: Step, sample: Sample) -> Memory:
    """With micro-batches of this bucket."""
    share = step.trained / step.layout.holders
    local, forward = step.local(sample), sample.forward
    return Memory(
        weights=4 * step.held / step.layout.holders,
        gradients=4 * share,
        optimizer=4 * moments(step) / step.layout.holders,
        averages=4 * step.averages * share,
        working=_working(step),
        activations=local * (forward.kept[step.checkpointing] + _exchanged(step, sample)),
        backward=local * (forward.again[step.checkpointing] + forward.widest),
        update=_update(step),
    )


def moments(step: Step) -> int:
    """Numbers an optimiser keeps beside the weights."""
    twice = 2 * step.trained
    return twice - step.weights.hidden if step.optimizer == "muon" else twice


def _working(step: Step) -> float:
    low, weights = step.compute_bytes, step.weights
    if step.layout.holders == 1:
        return low * weights.total if low < 4 else 0  # autocast casts every weight once
    # The rest stays gathered; its gradient and a block's are whole, and again while they are sent.
    gathered = weights.rest + 2 * weights.largest_block
    whole = max(weights.rest, weights.largest_block) * step.trained / weights.total
    return low * gathered + (low + 4) * whole


def _exchanged(step: Step, sample: Sample) -> float:
    """Of a sample dealt out: selective checkpointing keeps what attention's exchanges gave."""
    kept = step.layout.context > 1 and step.checkpointing == "selective"
    return sample.forward.attention_bytes if kept else 0


def _update(step: Step) -> float:
    """Of whole matrices momenta and updates; of shards also what is sent and received twice."""
    copies = 2 if step.layout.holders == 1 else 5
    held = 4 * step.weights.hidden / step.layout.holders
    return copies * held if step.optimizer == "muon" else 0
