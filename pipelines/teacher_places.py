"""Where training leaves what belongs to a teacher besides the model itself."""

from ldm_core.files import join

ADAPTER = "adapter"  # a folder of the teacher: what was merged into it, in peft's layout


def snapshots_place(product: str, run: str) -> str:
    """The folder of the snapshots of a run's averages: beside the product, which they outlive.

    Args:
        product: the teacher's URI.
        run: name of the run's checkpoints, `PRODUCT-DIGEST`.
    """
    return join(f"{product.rstrip('/')}-snapshots", run)
