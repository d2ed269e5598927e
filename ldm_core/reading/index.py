"""All that a reader is to know of a published version before it reads its rows.

It is made once and handed to every worker: five hundred of them that look at every footer would be
half a million requests. It can be pickled, and takes some 60 bytes for each row group and 32 for
each caption.
"""

from dataclasses import dataclass

from ldm_core.latents.manifest import Manifest
from ldm_core.latents.store import StoreVersion
from ldm_core.reading.sample_index import SampleIndex, index_samples
from ldm_core.reading.text_index import TextIndex, index_texts


@dataclass(frozen=True, eq=False)
class StoreIndex:
    """Of one version.

    Attributes:
        uri: of the store.
        manifest: of the version.
        samples: its units.
        texts: where its captions' embeddings are.
    """

    uri: str
    manifest: Manifest
    samples: SampleIndex
    texts: TextIndex

    @property
    def name(self) -> str:
        """Store and version, for messages."""
        return f"{self.uri} version {self.manifest.number}"


def index_store(version: StoreVersion) -> StoreIndex:
    """Look at a version's footers and the small columns of its texts.

    Raises:
        UserError: no sample, or captions that are there twice.
    """
    return StoreIndex(
        uri=version.store.uri,
        manifest=version.manifest,
        samples=index_samples(version),
        texts=index_texts(version),
    )
