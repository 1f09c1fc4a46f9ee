"""All defaults of training, evaluation and measurement.

The command line makes one option of each field, with the field's name and the help text given here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

DEFAULT_RATIOS = "0.25,0.5,0.75,1"


def option(
    default: Any,
    help: str,
    *short: str,
    only: Literal["on", "off", ""] = "",
    min: float | None = None,
    max: float | None = None,
) -> Any:
    """Returns a dataclass field with its help text, bounds and short flag, if any.

    A bool becomes the pair --name/--no-name, or with `only` just the one that turns it on or off.
    """
    return field(
        default=default, metadata={"help": help, "short": short, "only": only, "min": min, "max": max}
    )


@dataclass(frozen=True)
class MethodSettings:
    """Which method trains, and which of its parts are on."""

    method: str = option("scala", "Training method.")
    order: Literal["importance", "none"] = option(
        "importance", "How to order the channels of pretrained weights first; see scala convert."
    )
    calibrate: bool = option(
        True, "Skip fitting the widths to the full model, without labels, before training.", only="off"
    )
    isolation: bool | None = option(
        None,
        "Let the widths between smallest and largest keep the last channels, not the first. Default: the "
        "method's choice; off if channels are in order.",
    )
    progressive_transfer: bool = option(
        True,
        "If widths teach each other: let the largest teach all others, instead of each the next smaller.",
        only="off",
    )
    stable_sampling: bool = option(
        True,
        "Draw the widths between smallest and largest from anywhere, instead of one from each half.",
        only="off",
    )
    noise_calibration: bool = option(
        True, "Use labels for the largest width only, instead of for every width.", only="off"
    )
    teacher: Literal["all", "full", "none"] = option(
        "all",
        "Which widths the frozen starting model teaches; full means the full width only, as in the paper.",
    )
    favour_narrowest: bool = option(
        True, "Weight all losses equally, instead of the narrowest's as all others together.", only="off"
    )
    full_every: int = option(
        1,
        "Of scala: train the largest point in one of N steps, at random. 4 saves a third of the time.",
        min=1,
    )
    stages: str | None = option(
        None, "Of sit: blocks in each stage; each passes fewer tokens to the next. Default: four equal ones."
    )
    slim_keep: float = option(0.5, "Of sit: share of patch tokens that a stage passes to the next.", max=1)
    slim_start: Literal["pool", "random"] = option(
        "pool", "Of sit: start its modules as means of neighbouring patches, or at random as in the paper."
    )
    logit_weight: float = option(2.0, "Of sit: weight of the loss on the frozen model's output.", min=0)
    token_weight: float = option(
        2.0, "Of sit: weight of the loss on the frozen model's patch tokens, mean over blocks.", min=0
    )
    teacher_model: str | None = option(
        None, "Of sit: a second teacher for the distillation head, any timm model with the same classes."
    )
    smoothing: float = option(0.1, "Label smoothing.", min=0, max=1)
    class_token: float = option(
        0.1, "Of features: weight of the loss on the class token, or else on the pooled features.", min=0
    )
    patch_tokens: float = option(1.0, "Of features: weight of the loss on the patch tokens.", min=0)
    mask_patches: float = option(
        0.0,
        "Of features: weight of a further loss on half of the patches, which the trained width does not see; "
        "costs a second pass for every width.",
        min=0,
    )
    whiten: float = option(
        0.0,
        "Of features: how much directions of small variance are amplified in the loss; 0: not at all, 1: to "
        "equal variance.",
        min=0,
        max=1,
    )


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer, its schedule, and how a step is computed."""

    epochs: float = option(10, "Passes over the training images; 0.5 is half of one.", min=0.001, max=1e5)
    batch_size: int = option(128, "Images per step, in each process.", "-b", min=1)
    lr: float | None = option(
        None,
        "Peak learning rate, after warm-up and before cosine decay. Default: 2e-3 with muon, else 1e-3; for "
        "supervit 0.3 times that.",
        min=0,
    )
    min_lr: float = option(1e-6, "Learning rate at the end.", min=0)
    warmup_epochs: float | None = option(None, "Epochs of warm-up. Default: a twentieth of the run.", min=0)
    weight_decay: float = option(0.05, "Weight decay, except on biases, norms and embeddings.", min=0)
    layer_decay: float | None = option(
        None, "Multiply the learning rate by this for every block further from the output.", min=0, max=1
    )
    clip_grad: float | None = option(1.0, "Largest norm of the gradient; 0 turns clipping off.", min=0)
    opt: str | None = option(
        None,
        "Optimizer, by timm's name; with muon, learning rates are relative to the size of each weight. "
        "Default: muon for fitted widths and for features, else adamw. For features others need --lr.",
    )
    grad_accum_steps: int = option(
        1, "Process each batch in this many parts, to save memory; the step is the same.", min=1
    )
    grad_checkpointing: bool = option(
        False, "Recompute activations in the backward pass, to save memory. Default: off."
    )
    torchcompile: bool = option(
        False, "Compile every width, which takes minutes but makes steps faster; for long runs. Default: off."
    )
    save_every_steps: int | None = option(
        None, "Steps between saves for --resume. Default: every three minutes.", min=1
    )
    model_ema: bool = option(True, "Evaluate and save the moving average of the weights. Default: on.")
    model_ema_decay: float = option(
        0.9998, "Decay of the moving average, reached by a warm-up that suits short runs.", min=0, max=1
    )

    def for_share(self, share: float) -> "OptimizerSettings":
        """Returns the settings for a run of this share of the epochs, and of the warm-up."""
        warmup = None if self.warmup_epochs is None else self.warmup_epochs * share
        return replace(self, epochs=self.epochs * share, warmup_epochs=warmup)


@dataclass(frozen=True)
class AugmentSettings:
    """How training images are augmented."""

    aa: str | None = option(None, "RandAugment or another timm policy, for example rand-m1-mstd0.5-inc1.")
    scale: tuple[float, float] = option((0.8, 1.0), "Share of the image a random crop covers: min and max.")
    hflip: float = option(
        0.5, "Probability of a horizontal flip; use 0 for digits and letters.", min=0, max=1
    )
    reprob: float = option(0.0, "Probability of random erasing.", min=0, max=1)
    mixup: float = option(0.0, "Mixup alpha; the papers use 0.8 for hundreds of epochs.", min=0)
    cutmix: float = option(0.0, "Cutmix alpha; the papers use 1.", min=0)


@dataclass(frozen=True)
class ReadSettings:
    """How images are read."""

    data_dir: str | None = option(None, "Directory of a timm data set such as torch/cifar10.")
    workers: int = option(2, "Processes that read images; 0 reads in the main one.", "-j", min=0)
    on_corrupt: Literal["error", "skip"] = option(
        "error", "At an unreadable image: stop, or skip and count it."
    )
    exif: bool = option(True, "Turn photographs upright as their EXIF data says; timm does not. Default: on.")


@dataclass(frozen=True)
class DeviceSettings:
    """Device, precision and threads."""

    device: str | None = option(None, "cpu, cuda, cuda:1, mps. Default: a GPU if there is one.")
    amp: bool | None = option(
        None,
        "bfloat16 autocast. Default: on if the hardware computes in it, but off when predictions are timed.",
    )
    threads: int | None = option(None, "CPU threads. Default: torch's choice.", min=1)


@dataclass(frozen=True)
class EvalSettings:
    """How points are evaluated."""

    batch_size: int = option(128, "Images per batch.", "-b", min=1)
    resized: bool = option(
        False,
        "Read images at the largest size and resize them for the other points, as training, cascades and "
        "probes do. Default: read them at each point's own size, as its slice does.",
        only="on",
    )


@dataclass(frozen=True)
class ProbeSettings:
    """How embeddings are probed."""

    probe: Literal["knn", "linear", "recall"] | None = option(
        None,
        "Judge embeddings. knn, linear: on labelled images, by a vote of neighbours or a linear classifier, "
        "fitted to the full width's embeddings and to each width's own. recall: on any images, as queries to "
        "an index of the full width's embeddings, or of those of --against.",
    )
    probe_images: int = option(
        10_000, "At most this many training images to fit a probe to, and images to judge it on.", min=1
    )


@dataclass(frozen=True)
class CalibrationSettings:
    """How slices are fitted to the full model."""

    calibrate: bool | None = option(
        None,
        "Fit each slice to the full model on images of --data, without their labels. "
        "Default: on in scala convert, and in scala slice for an untrained width.",
    )
    calibration_images: int | None = option(
        None, "Number of images to fit on. Default: as many as have 40,960 patches, at least 128.", min=8
    )


@dataclass(frozen=True)
class FamilySettings:
    """How all widths of a family are fitted at once."""

    keep_full: float = option(
        0.99,
        "Least R² of the full width's output after fitting; higher values cost accuracy of narrower widths.",
        min=0,
        max=0.9999,
    )


DROP_BLOCKS: Any = option(
    None, "Blocks that drop tokens, counted from 1. Default: 4,7,10 of 12, at other depths in proportion."
)


@dataclass(frozen=True)
class TokenSettings:
    """How tokens are reduced at points such as 1~0.5, if the model was not trained for them."""

    tokens: Literal["merge", "drop"] | None = option(
        None,
        "Merge similar tokens in every block, or drop those that the class token attends to least. "
        "Default: as trained, else merge.",
    )
    drop_blocks: str | None = DROP_BLOCKS

    def given(self) -> bool:
        return self != TokenSettings()


@dataclass(frozen=True)
class GridSettings:
    """Which image sizes and shares of tokens are trained, besides the widths."""

    sizes: str | None = option(None, "Image sizes, such as 128,160,192,224. Default: the model's own.")
    keeps: str | None = option(
        None,
        "Shares of the tokens that each dropping block passes on. Default: 1; for supervit 0.5,0.7,1.",
    )
    tokens: Literal["merge", "drop"] | None = option(
        None,
        "Merge similar tokens in every block, or drop those that the class token attends to least. "
        "Default: drop, as in the paper.",
    )
    drop_blocks: str | None = DROP_BLOCKS
    resize: Literal["bilinear", "bicubic"] | None = option(
        None,
        "How images of the largest size are resized to the others: bilinear with aligned corners as in the "
        "paper, or bicubic with antialiasing. Default: bilinear.",
    )


@dataclass(frozen=True)
class BenchSettings:
    """How points are timed."""

    batch_size: int | None = option(
        None,
        "Images per batch. Default: 1 for the latency and the best for the throughput; in training 128.",
        "-b",
        min=1,
    )
    runs: int | None = option(
        None, "How often each is timed. Default: until the median is known to 2 %; in training 10.", min=1
    )
    runtime: str = option(
        "torch", "One or more of torch, compile, onnx, openvino, pt2, executorch: torch,onnx."
    )
    int8: bool = option(False, "Also time 8-bit weights, in ONNX Runtime.", only="on")


@dataclass(frozen=True)
class Budget:
    """Limits that the best point must meet, instead of --ratio."""

    max_latency_ms: float | None = option(None, "Milliseconds for one image, measured here.", min=0)
    max_gmacs: float | None = option(None, "Billions of multiply-accumulates of one image.", min=0)
    max_params: float | None = option(None, "Parameters, for example 6e6.", min=0)
    max_memory_mb: float | None = option(
        None, "Megabytes by which peak memory rises to load and run it once, measured here.", min=0
    )
    min_top1: float | None = option(
        None, "Top-1 in percent, as evaluated; the cheapest such point is chosen.", min=0, max=100
    )
    runtime: str = option(
        "torch", "Where latency and memory are measured: torch, compile, onnx, openvino, pt2 or executorch."
    )

    def limits(self) -> list[tuple[str, float, bool]]:
        """Returns (column of a row, limit, whether it is a minimum) for each limit."""
        given = {name: limit for name, limit in vars(self).items() if name != "runtime" and limit is not None}
        return [(name[4:], limit, name.startswith("min_")) for name, limit in given.items()]


@dataclass(frozen=True)
class RunSettings:
    """The seed, the validation images and what is recorded."""

    seed: int = option(0, "Seed of everything random.", min=0)
    holdout: float = option(
        0.0,
        "Evaluate on this share of the training images instead of val/. Default: for features without val/ a "
        "tenth, at most 1,000.",
        min=0,
        max=0.5,
    )
    log_grads: bool = option(
        False, "Write each width's gradient norm, and the cosines between widths, to grads.jsonl.", only="on"
    )
    task: Literal["classification", "features"] | None = option(
        None, "What the model is for. Default: features, without labels, if it has no classifier."
    )


ON_RESUME = (
    *("data_dir", "workers", "on_corrupt", "device", "threads"),
    *("grad_accum_steps", "grad_checkpointing", "torchcompile", "save_every_steps"),
    "epochs",
)
"""Settings that --resume may change. All but the last affect speed and memory, never the result."""


@dataclass(frozen=True)
class Settings:
    """One training run."""

    data: str
    method: MethodSettings = MethodSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    augment: AugmentSettings = AugmentSettings()
    read: ReadSettings = ReadSettings()
    device: DeviceSettings = DeviceSettings()
    run: RunSettings = RunSettings()

    def words(self) -> list[str]:
        """Returns the options of `scala finetune` that differ from their defaults but data and device."""
        groups = (self.method, self.optimizer, self.augment, self.run, self.read)
        given = {f.name: (getattr(group, f.name), f.default) for group in groups for f in fields(group)}
        given = {name: of for name, of in given.items() if name not in ("data_dir", "workers", "on_corrupt")}
        words = []
        for name, (value, default) in given.items():
            flag = name.replace("_", "-")
            if value == default:
                continue
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
        return words

    @classmethod
    def of(cls, values: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> "Settings":
        """Returns the settings of `values` from `dataclasses.asdict`, some of them replaced by name."""
        groups: dict[str, Any] = {f.name: type(f.default) for f in fields(cls) if is_dataclass(f.default)}
        chosen = {g: {k: (changes or {}).get(k, v) for k, v in values[g].items()} for g in groups}
        return cls(values["data"], **{name: group(**chosen[name]) for name, group in groups.items()})
