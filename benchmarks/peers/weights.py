"""What peers need beside the model's folder: LoRA adapters, and the weights as GGUF."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from prefix_store.model_loading import LoadedModel

LORA_RANK = 8
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def write_lora_adapters(loaded: LoadedModel, folder: Path, count: int) -> None:
    """`count` random adapters as PEFT saves them, each in a folder of its own."""
    config = LoraConfig(
        r=LORA_RANK,
        lora_alpha=LORA_RANK,
        target_modules=list(LORA_TARGETS),
        task_type="CAUSAL_LM",
        base_model_name_or_path=loaded.spec.name,
    )
    layers = {
        name: module
        for name, module in loaded.model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(LORA_TARGETS)
    }
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, layer in layers.items():
            a = torch.randn(LORA_RANK, layer.in_features, generator=generator)
            b = torch.randn(layer.out_features, LORA_RANK, generator=generator)
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"] = (0.01 * a).bfloat16()
            tensors[f"{key}.lora_B.weight"] = (0.01 * b).bfloat16()
        target = folder / f"adapter-{seed:02}"
        config.save_pretrained(str(target))
        save_file(tensors, target / "adapter_model.safetensors")


def write_bf16_gguf(source: Path, target: Path) -> None:
    """The GGUF file `source` with every matrix widened to bfloat16, its metadata as it was."""
    reader = gguf.GGUFReader(source)
    arch = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(target, arch)
    skipped = {"general.architecture", "general.file_type", "general.quantization_version"}
    for name, field in reader.fields.items():
        if name in skipped or name.startswith("GGUF."):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    bf16 = gguf.GGMLQuantizationType.BF16
    for tensor in reader.tensors:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if data.ndim == 1:  # norms stay in float32, as llama.cpp keeps them
            writer.add_tensor(tensor.name, data)
        else:
            writer.add_tensor(tensor.name, gguf.quants.quantize(data, bf16), raw_dtype=bf16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
