"""PEFT's adapters as files to upload."""

from __future__ import annotations

import json
from pathlib import Path

from peft import PeftModel

from prefix_store.model_loading import LoadedModel


def saved_adapter(
    adapted: PeftModel, loaded: LoadedModel, folder: Path
) -> list[tuple[str, tuple[str, bytes]]]:
    """An adapter's two files, as PEFT saves them."""
    adapted.save_pretrained(folder)
    # PEFT names the folder that it loaded from; here that is a cache's.
    written = json.loads((folder / "adapter_config.json").read_text())
    written["base_model_name_or_path"] = loaded.spec.name
    files = {
        "adapter_config.json": json.dumps(written).encode(),
        "adapter_model.safetensors": (folder / "adapter_model.safetensors").read_bytes(),
    }
    return [("file", item) for item in files.items()]
