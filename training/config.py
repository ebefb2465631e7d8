"""What params.yaml may hold: one frozen model per section. Everything here is a value; params.py reads the files.

Devices, clients and clocks are passed beside it.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from training import recipes
from training.errors import UserError
from training.hyperrule import Preset
from training.recipes import RECIPES, LrScaling, Plan, RecipeName

TENANT_SECTIONS = ("pack", "finetune", "evaluate", "export")
Positive = Annotated[int, Field(ge=1)]
Precision = Literal["fp32", "bf16"]
Sharding = Literal["none", "full"]
Method = Literal["ridge", "linear", "finetune"]
Share = Annotated[float, Field(ge=0, le=1)]
SplitName = Annotated[str, Field(pattern=r"^[\w-]+$")]  # it becomes the name of a file


class ConfigError(UserError):
    """A value that the user gave cannot be used. The message names it, the choices and the next step."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class UpstreamConfig(Section):
    """Which network all tenants start from."""

    arch: str = Field("R50x1", description="row of the zoo table")
    weights: str | None = Field(None, description="published weights (.npz, path or URL) to adopt instead of training")
    sha256: str | None = Field(None, description="what `weights` must hash to; printed when not given")


class PackConfig(Section):
    """Pictures → shards."""

    source: str | None = Field(
        None, description="folder, CSV or JSONL; default data/upstream or tenants/<name>/pictures"
    )
    splits: dict[SplitName, float] = Field(
        {"train": 0.9, "test": 0.1}, description="shares, where the source names no splits"
    )
    shard_bytes: Positive = Field(256 * 2**20, description="size at which a new shard begins")
    multi_label: bool | None = Field(None, description="several labels a picture; default: as found in the source")
    strict: bool = Field(False, description="refuse the dataset when one picture cannot be read")


HOW = (
    *("micro_batch", "evaluate_every", "checkpoint_every", "keep_checkpoints", "keep_every"),
    *("activation_checkpointing", "sharding", "timeout_s", "max_skipped_steps", "max_failures", "max_hours"),
    *("augment_on", "fused", "scratch"),
)


class Optimisation(Section):
    """What upstream and downstream training share beside their schedules."""

    micro_batch: Positive | Literal["auto"] | None = Field(
        None, description="examples per forward/backward and rank; default: all at once; auto: what memory allows"
    )
    activation_checkpointing: bool = Field(False, description="compute activations twice instead of keeping them")
    fused: bool | Literal["auto"] = Field(
        "auto",
        description="GroupNorm and ReLU, and standardisation, as one operation each; auto: on a processor with a compiler",
    )
    flips: bool = Field(True, description="random horizontal flips; false where orientation carries the label")
    crops: bool = Field(True, description="random crops; false where the place in the picture carries the label")
    precision: Precision = Field("fp32", description="bf16 runs the network under autocast; weights stay fp32")
    seed: int = Field(0, ge=0)
    evaluate_every: Positive = Field(500, description="optimizer steps between evaluations")
    checkpoint_every: Positive = Field(500, description="optimizer steps between checkpoints")
    keep_checkpoints: Positive = Field(2, description="how many of the newest checkpoints are kept")
    keep_every: int = Field(0, ge=0, description="checkpoints of every so many steps are kept too; 0: none")
    sharding: Sharding = Field(
        "none", description="full: every rank holds a part of the network (FSDP2), for large ones"
    )
    timeout_s: Positive = Field(600, description="how long a rank waits for the others before it ends with an error")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        None, description="a step with a larger gradient is skipped; default: only one that is not finite"
    )
    max_skipped_steps: int = Field(0, ge=0, description="skipped steps in a row before training stops")

    max_failures: int | None = Field(
        None, ge=0, description="attempts that may fail or be killed before a restart is refused; default: any number"
    )
    max_hours: Annotated[float, Field(gt=0)] | None = Field(
        None, description="wall clock of all attempts together; then a checkpoint and the end; default: no limit"
    )
    augment_on: Literal["host", "device"] = Field(
        "host", description="device: crops and flips on the accelerator, the same bytes; crops by area stay on the host"
    )

    def decisive(self) -> dict[str, Any]:
        """The values that decide the result: all but those that say how it is reached."""
        return self.model_dump(exclude=set(HOW))


class PretrainConfig(Optimisation):
    """Upstream training, counted in optimizer steps. With a `recipe`, keys that are not set take the recipe's values."""

    recipe: RecipeName | None = Field(None, description="published training: bit-s, bit-m or bit-l")
    epochs: float | None = Field(None, gt=0, description="of a recipe; scales it down with all its boundaries")
    lr_scaling: LrScaling = Field("linear", description="of a recipe: lr × global_batch / 256, or `none`")
    steps: Positive | None = 3_000
    global_batch: Positive = Field(128, description="examples per optimizer step over all ranks")
    lr: float = Field(0.03, gt=0)
    warmup_steps: int = Field(100, ge=0)
    decays: tuple[float, ...] = Field((0.33, 0.67, 0.89), description="shares of the steps after which lr falls by 10")
    weight_decay: float = Field(1e-4, ge=0)
    mixup_alpha: float = Field(0.0, ge=0)
    resize: Positive = 256
    crop: Positive = 224
    head_bias: float | None = Field(
        None, description="start of the head's bias; default: -10 in a recipe, sigmoid loss"
    )

    @model_validator(mode="after")
    def _ordered(self) -> "PretrainConfig":
        if self.recipe is None:
            if self.epochs is not None:
                raise ValueError(
                    f"epochs={self.epochs:g} needs a recipe ({', '.join(RECIPES)}); without one give steps"
                )
            if self.steps is None:
                raise ValueError("steps=null needs a recipe, whose epochs then count")
        elif self.epochs is not None and self.stated("steps"):
            raise ValueError(f"epochs={self.epochs:g} and steps={self.steps}: give one of them (steps: null)")
        if self.recipe is None:
            self._rising(self.supports)
        return self

    def _rising(self, supports: tuple[int, ...]) -> None:
        if list(supports) != sorted(supports):
            raise ConfigError(
                f"pretrain: warmup_steps={self.warmup_steps}, decays={self.decays} of steps={supports[-1]} give the boundaries "
                f"{supports}, which do not rise; lower warmup_steps or raise steps"
            )

    def stated(self, key: str) -> bool:
        """Whether params.yaml sets `key` (to something other than null)."""
        return key in self.model_fields_set and getattr(self, key) is not None

    @property
    def supports(self) -> tuple[int, ...]:
        """Boundaries of the schedule where no recipe gives them."""
        steps = self.steps or 3_000
        return (self.warmup_steps, *(round(share * steps) for share in self.decays), steps)

    def plan(self, num_examples: int) -> Plan:
        """Steps, batch, lr and boundaries on a training set of `num_examples` pictures."""
        if self.recipe is None:
            assert self.steps is not None
            return Plan(self.steps, self.global_batch, self.lr, self.supports)
        batch = self.global_batch if self.stated("global_batch") else None
        lr = self.lr if self.stated("lr") else None
        if self.stated("steps"):
            assert self.steps is not None
            whole = (batch or recipes.BATCH) * self.steps / num_examples
        else:
            whole = self.epochs  # type: ignore[assignment]
        plan = recipes.plan(
            self.recipe,
            num_examples,
            epochs=whole,
            global_batch=batch,
            lr=lr,
            lr_scaling=self.lr_scaling,
            warmup_steps=self.warmup_steps if self.stated("warmup_steps") else None,
            decays=self.decays if self.stated("decays") else None,
        )
        self._rising(plan.supports)
        return plan


class FinetuneConfig(Optimisation):
    """Downstream training. Each value left at null is the HyperRule's; each that is set is a stated deviation."""

    preset: Preset = "slides"
    resize: Positive | None = None
    crop: Positive | None = None
    steps: Positive | None = None
    global_batch: Positive | None = None
    lr: Annotated[float, Field(gt=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    mixup_alpha: Annotated[float, Field(ge=0)] | None = None
    scratch: bool = Field(False, description="also train the same network from scratch by the same rule, to compare")


class EvaluateConfig(Section):
    split: str = Field("test", description="which split is evaluated")
    batch_size: Positive = 256
    worst: int = Field(24, ge=0, description="how many of the worst mistakes the contact sheet shows")


class ExportConfig(Section):
    golden: int = Field(3, ge=1, le=8, description="test pictures kept in the export with their answers")
    tolerance: float = Field(1e-4, gt=0, description="largest difference allowed between ONNX Runtime and torch")
    threshold: float | None = Field(
        None, ge=0, le=1, description="below this probability the service answers `unknown`"
    )


class NodesConfig(Section):
    """What the pods of one stage run on."""

    pool: Literal["gpu", "gpu-spot", "tpu", "cpu"] = Field("gpu", description="kind of nodes")
    node_selector: dict[str, str] = Field({}, description="labels of the nodes, in place of the pool's own")
    workers: Positive = Field(1, description="pods")
    devices: Positive = Field(1, description="GPUs, TPU chips or, on the pool cpu, processes per pod")
    cpu: str = Field("8", description="processors per pod")
    memory: str = Field("32Gi", description="memory per pod")


class ClusterConfig(Section):
    """Where and how `runner: kubernetes` and `bit submit` run pretrain and finetune. How, not what: no result depends on it."""

    context: str | None = Field(None, description="context of the kubeconfig; default: the current one")
    namespace: str = Field("bit", description="namespace of the jobs")
    tenant_namespace: str | None = Field(
        None, pattern=r"\{tenant\}", description="namespace of a tenant's jobs, as bit-{tenant}; default: namespace"
    )
    image: str | None = Field(None, description="training image, by digest: name@sha256:…")
    store: str | None = Field(None, description="URL below which jobs leave their results, as s3://bucket/store")
    remote: str | None = Field(None, description="URL of the DVC remote that pods read packed pictures from")
    tracking_uri: str | None = Field(None, description="MLflow as pods reach it; default: the project's tracking_uri")
    labels: Literal["gke", "bit"] = Field(
        "gke", description="how nodes say their pool: by GKE's labels, or by bit/pool"
    )
    queue: str | None = Field("training", description="Kueue's LocalQueue; null where there is no Kueue")
    pretrain: NodesConfig = NodesConfig()
    finetune: NodesConfig = NodesConfig()

    def namespace_of(self, tenant: str | None) -> str:
        """Where the jobs of a tenant, or of upstream training, run."""
        return self.tenant_namespace.format(tenant=tenant) if tenant and self.tenant_namespace else self.namespace

    def nodes(self, stage: str) -> NodesConfig:
        """What the pods of `pretrain` or `finetune` run on."""
        return {"pretrain": self.pretrain, "finetune": self.finetune}[stage]


class PromoteConfig(Section):
    """Gates of `bit promote`: the limits that a challenger must keep, held against the champion on the same pictures."""

    sample: Positive = Field(512, description="test pictures that both answer, at most")
    min_agreement: float = Field(0.75, ge=0, le=1, description="smallest share of equal answers")
    max_accuracy_drop: float = Field(0.01, ge=0, le=1, description="how much worse it may be, where there are labels")
    max_latency_ratio: float = Field(1.5, gt=0, description="how much longer a picture may take")


class PublishedConfig(Section):
    """Weights that the benchmark starts from, beside or in place of this project's own upstream."""

    name: str = Field(description="how tables and plots call them")
    arch: str = Field(description="row of the zoo table")
    weights: str = Field(description="path or URL of an .npz or, for timm's state dict, a .pth")
    sha256: str | None = Field(None, description="what they must hash to")
    pictures: Positive | None = Field(None, description="how many they were trained on, for the plot by upstream size")


class BenchmarkConfig(Section):
    """What `bit benchmark` measures. Each value left at null is the suite's own."""

    root: str = Field("data/benchmark", description="folder that holds the datasets, each in a folder of its own")
    seeds: int = Field(3, ge=3, description="draws and orders that each figure is the median of")
    datasets: tuple[str, ...] | None = Field(None, min_length=1, description="rows of the datasets' table")
    methods: tuple[Method, ...] | None = Field(None, min_length=1)
    shots: tuple[Positive, ...] | None = Field(None, min_length=1, description="examples per class")
    archs: tuple[str, ...] | None = Field(None, min_length=1, description="rows of the zoo table; default: upstream's")
    shares: tuple[Share, ...] | None = Field(None, min_length=1, description="of upstream's pictures; 0: fresh filters")
    noises: tuple[Share, ...] | None = Field(None, min_length=1, description="shares of upstream's labels made wrong")
    published: tuple[PublishedConfig, ...] = Field((), description="published weights, in place of own upstreams")
    steps: Positive | None = Field(None, description="of fine-tuning; default: the HyperRule's")
    upstream_steps: Positive | None = Field(None, description="of an own upstream; default: pretrain's, by its share")
    head_std: float = Field(0.01, ge=0, description="of the head's random start; 0 is the paper's zero head")
    l2: float = Field(1024.0, gt=0, description="of ridge regression")


class Config(Section):
    """The whole of params.yaml."""

    runner: Literal["local", "kubernetes"] = Field("local", description="where pretrain and finetune run")
    tracking_uri: str = "sqlite:///.mlflow/mlflow.db"
    upstream: UpstreamConfig = UpstreamConfig()
    pretrain: PretrainConfig = PretrainConfig()
    pack: PackConfig = PackConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()
    cluster: ClusterConfig = ClusterConfig()
    promote: PromoteConfig = PromoteConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()
