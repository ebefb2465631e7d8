"""Classifiers on frozen features: ridge regression in closed form."""

import numpy as np
import torch
from numpy.typing import NDArray

from training.data.batches import eval_batches
from training.data.shards import Dataset, Split
from training.models.resnet import ResNet, normalize

L2 = 2.0**10


@torch.inference_mode()
def features(model: ResNet, split: Split, size: int, batch_size: int = 128) -> NDArray[np.float32]:
    """What the head would see, [n, D], in the split's order; pictures are squashed to size × size."""
    model.eval()
    rows = [
        model.feature_map(normalize(torch.from_numpy(images))).mean((2, 3))
        for images, _, _ in eval_batches(split, size, batch_size)
    ]
    return torch.cat(rows).numpy()


def ridge(x: NDArray[np.float32], labels: NDArray[np.int64], num_classes: int, l2: float = L2) -> NDArray[np.float64]:
    """Weights [D + 1, C] of least squares against ±1 with an unpenalised bias. Source: BiT's few-shot evaluation."""
    wanted = 2.0 * np.eye(num_classes)[labels] - 1
    mean_x, mean_y = x.mean(0, dtype=np.float64), wanted.mean(0)
    centred = x - mean_x
    # Fewer examples than features: the n × n form of the same solution.
    kernel = centred @ centred.T + l2 * np.eye(len(x))
    weights = centred.T @ np.linalg.solve(kernel, wanted - mean_y)
    return np.vstack([weights, mean_y - mean_x @ weights])


def accuracy(model: ResNet, data: Dataset, size: int, l2: float = L2) -> float:
    """Test accuracy of ridge regression on the features of the split `train`."""
    train, test = data.split("train"), data.split("test")
    weights = ridge(features(model, train, size), train.targets(), data.num_classes, l2)
    answers = features(model, test, size) @ weights[:-1] + weights[-1]
    return float((answers.argmax(1) == test.targets()).mean())
