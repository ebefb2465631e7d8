"""What a person can mend. Every such error is one of these; `bit` prints its message and ends with its status.

UserError
├── ConfigError       config.py      params.yaml, --set, a receipt that is not there yet
├── SourceError       data/sources   pictures and tables that cannot be packed
├── PackError         pack.py        a dataset that was refused
├── DatasetError      data/shards    shards that are missing or damaged
├── RemoteError       data/remote    a file of the DVC remote that its hash does not fit
├── ArchError         models/zoo     an architecture that the table lacks
├── WeightsError      models/npz     a weights file that does not fit
├── CheckpointError   engine         a checkpoint of another training
├── BatchError        engine         a batch that cannot be cut into ranks and micro-batches
├── BudgetError       engine         a training that failed too often or took too long
├── DivergedError     engine         the loss is no longer finite
├── TrackingError     tracking.py    MLflow does not answer when its answer is needed
├── ParityError       export.py      ONNX Runtime and torch disagree
├── ManifestError     cluster        a file in k8s/ that the cluster would refuse or misunderstand
├── ClusterError      cluster        the cluster cannot be reached, or refuses
│   └── JobError      submit.py      a job that failed: `bit` ends with its container's exit code
└── GateError         promote.py     a challenger that a gate holds back

Messages name the value, the choices and what to do next.
"""


class UserError(ValueError):
    """Something that the person at the keyboard can mend. status: the exit status of `bit`."""

    status = 2
