"""Accelerators by name: what their data sheets say, and what an hour of one may cost."""

from dataclasses import dataclass
from typing import Final

from ldm_core.errors import UserError

USABLE: Final = 0.92
"""Share of the memory for tensors; the rest is the driver's, the libraries' and the allocator's."""


@dataclass(frozen=True)
class Accelerator:
    """One device among others like it.

    Attributes:
        name: as `--accelerator` takes it.
        tflops: dense bfloat16 peak with float32 accumulation, 1e12 FLOP/s; a multiply-add is 2.
        gib: memory as its driver reports it.
        memory_gbs: bandwidth of that memory, 1e9 bytes/s.
        intra_gbs: to the others of its node, 1e9 bytes/s in one direction.
        inter_gbs: to other nodes, its share of the node's network, 1e9 bytes/s.
        per_node: of them in a node.
        hour_price: US dollars; typical of rental late in 2025, an assumption to be replaced.
    """

    name: str
    tflops: float
    gib: float
    memory_gbs: float
    intra_gbs: float
    inter_gbs: float
    per_node: int
    hour_price: float

    @property
    def usable_bytes(self) -> float:
        """What tensors may take."""
        return USABLE * self.gib * 2**30

    def bandwidth(self, span: int) -> float:
        """Bytes/s at which each of `span` neighbouring devices sends to the others at once."""
        return 1e9 * (self.intra_gbs if span <= self.per_node else self.inter_gbs)


# Peaks, memory and links: the makers' data sheets of the SXM (A100, H100, H200, B200), OAM and PCIe
# boards, without sparsity. Networks: 8 x 200 Gb/s (A100) and 8 x 400 Gb/s (H100 and later) a node;
# 100 Gb/s for 8 A10G; 10 Gb/s for a workstation.
ACCELERATORS: Final = {
    each.name: each
    for each in (
        Accelerator("H100-80", 989.4, 79.6, 3350, 450, 50, 8, 3.0),
        Accelerator("H200-141", 989.4, 140.4, 4800, 450, 50, 8, 3.8),
        Accelerator("B200-180", 2250, 179.0, 7700, 900, 50, 8, 5.5),
        Accelerator("A100-80", 312, 79.3, 2039, 300, 25, 8, 1.8),
        Accelerator("A100-40", 312, 39.5, 1555, 300, 25, 8, 1.3),
        Accelerator("L40S-48", 362, 45.0, 864, 32, 25, 8, 1.0),
        Accelerator("A10G-24", 70, 22.5, 600, 32, 1.56, 8, 1.0),
        Accelerator("RTX4090-24", 165.2, 24.0, 1008, 16, 1.25, 4, 0.4),
        Accelerator("MI300X-192", 1307.4, 191.7, 5300, 448, 50, 8, 2.0),
    )
}


def accelerator(name: str) -> Accelerator:
    """The accelerator of a name.

    Raises:
        UserError: none of those that are known.
    """
    if name not in ACCELERATORS:
        raise UserError(f"no accelerator {name}: known are {', '.join(ACCELERATORS)}")
    return ACCELERATORS[name]
