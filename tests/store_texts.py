"""A store's embeddings in another dtype."""

import pyarrow as pa
import torch

from ldm_core.latents.codec import INT8_DTYPE, encode_embedding
from ldm_core.latents.rewrite import delete_rows
from ldm_core.latents.schema import TEXTS, decode_array
from ldm_core.latents.store import StoreVersion


def in_eight_bits(version: StoreVersion) -> StoreVersion:
    """A version whose every other token embedding has 8 bits."""
    store, rows = version.store, version.table("texts").sort_by("caption").to_pylist()
    for row in rows[::2]:
        for name, shape in (("tokens", row["tokens_shape"]), ("pooled", [1, row["pooled_size"]])):
            if row[name] is not None:
                values = torch.from_numpy(decode_array(row[name], shape).copy())
                row[name] = encode_embedding(values, INT8_DTYPE)
        row["dtype"] = INT8_DTYPE
    keys = version.table("texts").select(["caption_digest", "encoder"])
    delete_rows(store, "texts", keys)
    part = store.write_part("texts", pa.Table.from_pylist(rows, schema=TEXTS), "eight")
    store.commit("texts", [part], "eight")
    tables = version.manifest.tables | {"texts": store.open("texts").version()}
    number = store.publish(version.manifest.model_copy(update={"tables": tables}))
    return store.open_version(number)
