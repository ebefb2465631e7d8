"""Classifiers on frozen features: ridge regression in closed form, and a linear probe (logistic regression)."""

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from training.config import Method
from training.data.batches import eval_batches
from training.data.dataset import Split
from training.models.resnet import ResNet, normalize


@torch.inference_mode()
def features(model: ResNet, split: Split, size: int, batch_size: int = 128) -> NDArray[np.float32]:
    """What the head would see, [n, D], in the split's order; pictures are squashed to size × size."""
    device = next(model.parameters()).device
    model.eval()
    rows = [
        model.feature_map(normalize(torch.from_numpy(images).to(device))).mean((2, 3)).cpu()
        for images, _, _ in eval_batches(split, size, batch_size)
    ]
    return torch.cat(rows).numpy()


def ridge(x: NDArray[np.float32], labels: NDArray[np.int64], num_classes: int, l2: float) -> NDArray[np.float64]:
    """Weights [D + 1, C] of least squares against ±1 with an unpenalised bias. Source: BiT's few-shot evaluation."""
    wanted = 2.0 * np.eye(num_classes)[labels] - 1
    mean_x, mean_y = x.mean(0, dtype=np.float64), wanted.mean(0)
    centred = x - mean_x
    if len(x) < x.shape[1]:  # fewer examples than features: the n × n form of the same solution
        weights = centred.T @ np.linalg.solve(centred @ centred.T + l2 * np.eye(len(x)), wanted - mean_y)
    else:
        weights = np.linalg.solve(centred.T @ centred + l2 * np.eye(x.shape[1]), centred.T @ (wanted - mean_y))
    return np.vstack([weights, mean_y - mean_x @ weights])


def answers(
    method: Method,
    train: NDArray[np.float32],
    labels: NDArray[np.int64],
    asked: NDArray[np.float32],
    num_classes: int,
    l2: float,
) -> NDArray[np.int64]:
    """The class that a probe, fitted to features [n, D] and labels [n], gives to each of the features asked, [m]."""
    if method == "ridge":
        weights = ridge(train, labels, num_classes, l2)
        return (asked @ weights[:-1] + weights[-1]).argmax(1)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5_000))
    return np.asarray(probe.fit(train, labels).predict(asked), np.int64)
