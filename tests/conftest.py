"""Models shared by every test: tiny random ones of each shape, and the real SmolLM2."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MBartConfig,
    OPTConfig,
    PegasusConfig,
    PreTrainedConfig,
    Qwen2Config,
    T5Config,
)

from prefix_store.base_model import BaseModelSpec
from prefix_store.model_loading import DEFAULT_MODEL, LoadedModel, load_base_model
from prefix_store.prefix_attention import use_prefix_attention

# Tiny models are faster on one thread, and steps are compared exactly whatever their number.
torch.set_num_threads(1)

VOCAB = 97
POSITIONS = 96

TINY_CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=VOCAB,
        max_position_embeddings=POSITIONS,
    ),
    "gpt2": GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        vocab_size=VOCAB,
        n_positions=POSITIONS,
        bos_token_id=1,
        eos_token_id=5,
    ),
    "qwen2": Qwen2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=VOCAB,
        max_position_embeddings=POSITIONS,
    ),
    "gpt_neox": GPTNeoXConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCAB,
        max_position_embeddings=POSITIONS,
    ),
    "opt": OPTConfig(
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCAB,
        max_position_embeddings=POSITIONS,
        word_embed_proj_dim=32,
    ),
}

_BART_SIZES = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 5,
    "decoder_start_token_id": 5,
    "init_std": 0.3,
}
TINY_ENCODER_DECODERS: dict[str, PreTrainedConfig] = {
    "bart": BartConfig(**_BART_SIZES, forced_bos_token_id=None, forced_eos_token_id=None),
    "mbart": MBartConfig(**_BART_SIZES, forced_eos_token_id=None, scale_embedding=True),
    "pegasus": PegasusConfig(**_BART_SIZES, forced_eos_token_id=None),
    "t5": T5Config(
        d_model=32,
        d_kv=12,
        d_ff=48,
        num_layers=3,
        num_heads=3,
        vocab_size=VOCAB,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=5,
        initializer_factor=1.0,
        tie_word_embeddings=False,
    ),
}


def tiny_encoder_decoder(shape: str, tokenizer: Any = None) -> LoadedModel:
    """A random float32 encoder-decoder with logits spread enough for greedy decoding to vary."""
    torch.manual_seed(7)
    config = copy.deepcopy(TINY_ENCODER_DECODERS[shape])
    if tokenizer is not None:
        config.vocab_size = len(tokenizer)
    model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for bias in (p for name, p in model.named_parameters() if "relative_attention" in name):
            bias.normal_()
    spec = BaseModelSpec.from_model(model, f"tiny-{shape}")
    use_prefix_attention(model, spec)
    return LoadedModel(model, tokenizer, spec)


@pytest.fixture(scope="session", params=sorted(TINY_ENCODER_DECODERS))
def tiny_seq2seq(request: pytest.FixtureRequest) -> LoadedModel:
    """One tiny random model per encoder-decoder shape that the engine promises to serve."""
    return tiny_encoder_decoder(request.param)


def tiny_model(shape: str) -> LoadedModel:
    """A random float32 model with logits spread enough for greedy decoding to vary."""
    return random_model(TINY_CONFIGS[shape], f"tiny-{shape}")


def random_model(config: PreTrainedConfig, name: str) -> LoadedModel:
    """`tiny_model` of any shape."""
    torch.manual_seed(7)
    config.initializer_range = 0.3
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = 5
    model.generation_config.pad_token_id = 0
    return LoadedModel(model, tokenizer=None, spec=BaseModelSpec.from_model(model, name))


@pytest.fixture(scope="session", params=sorted(TINY_CONFIGS))
def tiny(request: pytest.FixtureRequest) -> LoadedModel:
    """One tiny random model per shape that the engine promises to serve."""
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def tiny_llama() -> LoadedModel:
    """A tiny random Llama."""
    return tiny_model("llama")


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """Where the converted default model is kept between test runs."""
    default = Path(__file__).parent.parent / ".cache" / "models"
    return Path(os.environ.get("PREFIXSERVE_TEST_MODELS", default))


@pytest.fixture(scope="session")
def smollm2(models_dir: Path) -> LoadedModel:
    """The real default model in float32."""
    return load_base_model(
        DEFAULT_MODEL, device=torch.device("cpu"), dtype=torch.float32, cache_dir=models_dir
    )


@pytest.fixture(scope="session")
def tiny_llama_dir(smollm2: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama and the real tokenizer, to start servers on."""
    # The fast runner takes heads of 16.
    return save_tiny_llama(tmp_path_factory.mktemp("tiny-llama"), smollm2, head_dim=16)


def save_tiny_llama(folder: Path, smollm2: LoadedModel, head_dim: int) -> Path:
    """Write the model and the tokenizer of `tiny_llama_dir`."""
    torch.manual_seed(11)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        vocab_size=smollm2.model.config.vocab_size,
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=smollm2.tokenizer.eos_token_id,
        bos_token_id=smollm2.tokenizer.bos_token_id,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = smollm2.tokenizer.eos_token_id
    model.save_pretrained(folder)
    smollm2.tokenizer.save_pretrained(folder)
    return folder
