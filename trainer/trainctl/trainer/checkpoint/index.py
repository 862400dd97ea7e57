"""Reading DCP's index (`.metadata`): a pickle, so of it nothing is taken but what an index is made of.

A manifest says that the file is what was written, not that it was well meant: a checkpoint from elsewhere has a
manifest that fits, and its copy belongs to us.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from trainctl.trainer.checkpoint.errors import CheckpointError
from trainctl.trainer.checkpoint.save import DCP_METADATA
from trainctl.wire.manifest import Manifest, read_vouched

_METADATA = "torch.distributed.checkpoint.metadata"
_DATA = frozenset(
    {
        *((_METADATA, name) for name in ("Metadata", "TensorStorageMetadata", "TensorProperties", "StorageMeta")),
        *((_METADATA, name) for name in ("ChunkStorageMetadata", "BytesStorageMetadata", "MetadataIndex")),
        (_METADATA, "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        ("collections", "OrderedDict"),
    }
)
_PATHS = frozenset({("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")})  # 3.13 moved it


class _Index(pickle.Unpickler):
    """Knows the classes of an index, and no other name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PATHS:
            return Path
        if (module, name) in _DATA or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise CheckpointError(f"{DCP_METADATA} asks for {module}.{name}, which no index needs: not loaded")


def read_index(path: Path, manifest: Manifest) -> Metadata:
    """What tensors a checkpoint holds and where. Raises CheckpointError, DamagedCheckpoint, OSError."""
    content = read_vouched(path, manifest, DCP_METADATA)
    metadata = _Index(io.BytesIO(content)).load()
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{DCP_METADATA} of {manifest.id} is not the index of a checkpoint: not loaded")
    listed = {file.name for file in manifest.files}
    for stored in (metadata.storage_data or {}).values():
        if stored.relative_path not in listed:
            raise CheckpointError(
                f"{DCP_METADATA} of {manifest.id} names {stored.relative_path!r}, which its manifest does not list: "
                "not loaded"
            )
    return metadata
