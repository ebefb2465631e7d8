"""The BiT HyperRule: from a dataset's size and its pictures' area to every hyper-parameter of fine-tuning.

Source: "Big Transfer (BiT): General Visual Representation Learning", Kolesnikov et al., 2020, section 3.3 and appendix A;
the boundaries of the schedule are those of the authors' published code. Pure arithmetic: no framework is imported here.
"""

from dataclasses import dataclass, replace
from typing import Literal, Self

from training.schedules import staircase

Preset = Literal["slides", "paper", "reference"]

SMALL_AREA = 96 * 96  # pixels; pictures below it are resized to 160 and cropped to 128
MEDIUM_FROM, LARGE_FROM = 20_000, 500_000  # training examples

# End of the warm-up, three decays by 10, end of training; counted in optimizer steps.
SUPPORTS_SMALL = (100, 200, 300, 400, 500)
SUPPORTS_MEDIUM = (500, 3_000, 6_000, 9_000, 10_000)
SUPPORTS_LARGE = (500, 6_000, 12_000, 18_000, 20_000)

# preset → (resize, crop) of large pictures, weight decay. Everything else is common to all three.
PRESETS: dict[Preset, tuple[int, int, float]] = {
    "slides": (448, 384, 1e-4),
    "paper": (448, 384, 0.0),
    "reference": (512, 480, 0.0),
}


@dataclass(frozen=True)
class HyperRule:
    """All that fine-tuning needs to know. Build it with `HyperRule.of`.

    resize, crop: side lengths in pixels (pictures are squashed to resize × resize, then cropped to crop × crop);
    supports: optimizer steps at which the warm-up ends, the learning rate falls (three times) and training ends;
    mixup_alpha: parameter of the Beta distribution that λ is drawn from, 0 for no mixup; batch_size: the global batch.
    """

    resize: int
    crop: int
    supports: tuple[int, ...]
    mixup_alpha: float
    weight_decay: float
    batch_size: int = 512
    base_lr: float = 0.003
    momentum: float = 0.9

    @classmethod
    def of(cls, num_examples: int, width: int, height: int, preset: Preset = "slides") -> Self:
        """The rule for a training set of `num_examples` pictures that are typically `width` × `height` pixels.

        Raises ValueError when a count or a size is below 1 or the preset is unknown.
        """
        if num_examples < 1 or width < 1 or height < 1:
            raise ValueError(
                f"num_examples={num_examples}, width={width}, height={height}: the HyperRule needs at least one example "
                "of at least 1 × 1 pixels. Check the packed dataset's index.json."
            )
        if preset not in PRESETS:
            raise ValueError(f"preset={preset!r} is not known. Choose one of {', '.join(PRESETS)}.")
        large_resize, large_crop, weight_decay = PRESETS[preset]
        resize, crop = (160, 128) if width * height < SMALL_AREA else (large_resize, large_crop)
        if num_examples < MEDIUM_FROM:
            supports = SUPPORTS_SMALL
        elif num_examples < LARGE_FROM:
            supports = SUPPORTS_MEDIUM
        else:
            supports = SUPPORTS_LARGE
        mixup_alpha = 0.0 if num_examples < MEDIUM_FROM else 0.1
        return cls(resize, crop, supports, mixup_alpha, weight_decay)

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return self.supports[-1]

    def lr(self, step: int) -> float:
        """Learning rate of the optimizer step `step` (counted from 0); 0 from the end of training on."""
        return staircase(step, self.base_lr, self.supports)

    def with_steps(self, steps: int) -> Self:
        """The same rule stretched to `steps` optimizer steps: every boundary keeps its share of the whole."""
        if steps == self.steps:
            return self
        if steps < 1:
            raise ValueError(f"steps={steps}: at least one optimizer step is needed.")
        return replace(self, supports=tuple(round(s * steps / self.steps) for s in self.supports))
