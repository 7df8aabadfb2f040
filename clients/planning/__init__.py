"""What a deployment needs, computed from a model's config: `prefixserve plan`."""

from clients.planning.hit_rate import lru_hit_rate, zipf
from clients.planning.model_size import ModelSize, model_size
from clients.planning.plan import Machine, Plan, Speed, Workload, make_plan

__all__ = [
    "Machine",
    "ModelSize",
    "Plan",
    "Speed",
    "Workload",
    "lru_hit_rate",
    "make_plan",
    "model_size",
    "zipf",
]
