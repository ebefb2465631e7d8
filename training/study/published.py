"""Published figures, top-1 in percent. Source: BiT, tables 1 and 2, and figure 2's mean over VTAB's tasks."""

PUBLISHED: dict[str, dict[str, str]] = {
    "BiT-M R50x1": {"cifar10": "97.4", "cifar100": "86.6", "ilsvrc": "80.68"},
    "BiT-M R152x2": {"cifar10": "98.5", "cifar100": "91.3", "ilsvrc": "85.15"},
    "BiT-M R101x3": {"cifar10": "98.6", "cifar100": "91.2"},
    "BiT-L R152x4": {"ilsvrc": "87.54", "cifar10": "99.37", "cifar100": "93.51", "pets": "96.62", "flowers": "99.63"},
}
VTAB_MEAN = "76.3"  # BiT-L
