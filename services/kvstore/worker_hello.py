"""What a worker's hello must say to be let in. Pure."""

from __future__ import annotations

from common.kv.layout import KvLayout
from common.messages import Member
from kvbaton.errors import ProtocolError
from services.kvstore.serving import Serving


def check_worker(
    worker: Member, serving: Serving | None, *, num_workers: int, kv_bytes: int
) -> KvLayout:
    """The layout of its blocks. The first worker decides the model and its layout, and so does the
    first after all others have gone. Raises ProtocolError.

    `serving` is what the store serves to `num_workers`, in an arena of `kv_bytes`.
    """
    layout = worker.layout
    if layout is None:
        raise ProtocolError("a worker's hello must carry its layout", field="layout")
    if serving is not None and num_workers and not is_served(worker, serving):
        raise ProtocolError(
            f"the cluster serves model {serving.fingerprint[:12]} with KV {serving.layout}, "
            f"this worker {worker.fingerprint[:12]} with {layout}: workers must load the same "
            "model with the same dtype, quantization and kv_cache_dtype",
            field="fingerprint",
        )
    if not worker.endpoint or worker.max_num_seqs < 1:  # scripts/doctor asks no more than this
        raise ProtocolError(
            "a worker's hello must carry endpoint and max_num_seqs", field="endpoint"
        )
    if kv_bytes // layout.block_bytes < 2:
        raise ProtocolError(f"--kv-bytes {kv_bytes} holds no two KV blocks of {layout.block_bytes}")
    return layout


def is_served(worker: Member, serving: Serving) -> bool:
    """Whether it brings the model that the store serves."""
    return (worker.layout, worker.fingerprint) == (serving.layout, serving.fingerprint)
