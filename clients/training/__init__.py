"""Train a prefix for a task: `train(TrainSettings(...), load_base_model(...), rows, folder)`."""

from clients.training.run import Trained, train
from clients.training.settings import TrainSettings

__all__ = ["TrainSettings", "Trained", "train"]
