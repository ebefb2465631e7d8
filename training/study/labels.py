"""Labels of VTAB's structured tasks, from an example's fields as TFDS names them. Source: Zhai et al., 2019, and its code."""

from typing import Any

import numpy as np

CLEVR_EDGES = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
KITTI_EDGES = (-100.0, 8.0, 20.0, 999.0)
NO_VEHICLE, VEHICLES = 1000.0, 3  # types 0 to 2 are car, van and truck


def bucket(value: float, edges: tuple[float, ...]) -> int:
    """The last edge that lies below a value."""
    return int(np.flatnonzero(np.array(edges) < value).max())


def clevr_count(fields: dict[str, Any]) -> int:
    """3 to 10 objects."""
    return np.size(fields["objects/size"]) - 3


def clevr_distance(fields: dict[str, Any]) -> int:
    """Depth of the nearest object: the third of its pixel coordinates."""
    return bucket(float(np.reshape(fields["objects/pixel_coords"], (-1, 3))[:, 2].min()), CLEVR_EDGES)


def kitti_distance(fields: dict[str, Any]) -> int:
    """Metres to the nearest car, van or truck, in three ranges, and one class for none."""
    kinds, places = np.ravel(fields["objects/type"]), np.reshape(fields["objects/location"], (-1, 3))
    return bucket(float(min([*places[kinds < VEHICLES, 2], NO_VEHICLE])), KITTI_EDGES)


def dsprites_location(fields: dict[str, Any]) -> int:
    """32 horizontal positions in 16 classes."""
    return int(np.ravel(fields["label_x_position"])[0]) // 2


def dsprites_orientation(fields: dict[str, Any]) -> int:
    """40 angles in 16 classes."""
    return int(int(np.ravel(fields["label_orientation"])[0]) / 2.5)
