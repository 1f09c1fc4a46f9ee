"""One training step: all passes of a method on one batch, then one update of the weights."""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from random import Random
from typing import Any

import torch
from timm.data import Mixup
from timm.models import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, random_seed
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from scala_cli.device import allow_compiling_all
from scala_cli.errors import TrainingError, naming_failure
from scala_cli.memory import naming_lack_of_memory
from scala_cli.methods import method_named
from scala_cli.methods.base import Batch, BlockOutput
from scala_cli.models.modes import skip_unread
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.tokens import reductions
from scala_cli.models.vit import choose_attention, random_images
from scala_cli.precision import autocast, uses_bfloat16
from scala_cli.settings import AugmentSettings, Settings
from scala_cli.slicing.point import Point
from scala_cli.tasks.base import Task
from scala_cli.tasks.masking import hide_half
from scala_cli.training.expert import Expert
from scala_cli.training.gradients import GradientLog
from scala_cli.training.muon import fast_muon
from scala_cli.training.rates import default_optimizer, default_rate, has_relative_rates, make_relative
from scala_cli.world import ALONE, World


class Step:
    """A model with its teacher and its optimizer; calling it with a batch updates the weights once.

    All randomness depends only on the seed and the number of the step.

    Args:
        start: the model to start from.
        task: what the model is for.
        teacher: the model whose full width teaches, frozen; None without a teacher.
        world: the processes that share each batch.

    Raises:
        TrainingError: for settings that timm rejects.
        PointError: if a width leaves no whole number of channels.
    """

    def __init__(
        self,
        start: SlimmableViT,
        task: Task,
        teacher: SlimmableViT | None,
        settings: Settings,
        device: torch.device,
        world: World = ALONE,
    ) -> None:
        self.settings, self.device, self.world, self.task = settings, device, world, task
        self.statistics: dict[str, Tensor] = {}
        """The task's statistics of the teacher's outputs, measured once."""
        self.method = method_named(settings.method.method)(start.points, settings.method, task)
        self.net = start.copied().to(device)
        self.net.vit.set_grad_checkpointing(settings.optimizer.grad_checkpointing)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.run.seed)
            self.modules = self.method.modules(self.net).to(device)
        named = settings.method.teacher_model
        self.expert = Expert(named, start.spec).to(device) if named else None
        # copied, as rounding of matrix products depends on the memory alignment of tensors read from a file
        self.frozen = teacher.copied().vit.to(device).requires_grad_(False) if teacher else None
        for vit in (self.net.vit, self.frozen):
            if vit:
                choose_attention(vit, device, uses_bfloat16(device, settings.device))
        for model in (self.net, self.modules, self.frozen):
            if model:
                world.agree(model)
        chosen = settings.optimizer
        name = chosen.opt or default_optimizer(start, task)
        if chosen.lr is None and not task.labelled and not has_relative_rates(name):
            raise TrainingError(
                f"{name} has no default learning rate for features.",
                remedy="example",
                setting="lr",
                value="1e-5",
            )
        self.rate = default_rate(name) * self.method.rate if chosen.lr is None else chosen.lr
        with refusing_settings():
            self.mix = mixer(settings.augment, settings.method.smoothing, max(1, start.spec.num_classes))
            self.optimizer = self.optimizer_of(name)
        if getattr(self.optimizer, "is_second_order", False):
            raise TrainingError(
                f"{name} needs second derivatives, which training does not keep.",
                remedy="try",
                setting="opt",
                value="adamw",
            )
        self.average = (
            ModelEmaV3(self.net, decay=chosen.model_ema_decay, use_warmup=True) if chosen.model_ema else None
        )
        self.evaluated: SlimmableViT = self.average.module if self.average else self.net
        for vit in (self.net.vit, self.frozen):  # not the average, which was copied above
            if vit and not (task.every_token or self.method.reads_blocks):
                skip_unread(vit)
        self.run: Callable[..., Any] = self.observe if self.method.reads_blocks else task.forward
        self.compiling = compiling(settings)
        if chosen.torchcompile:
            allow_compiling_all()
            if task.every_token or self.method.reads_blocks:  # `run` is not the model's own forward
                self.run = torch.compile(self.run, dynamic=False)
            else:
                for model in filter(None, (self.net, self.frozen)):
                    model.compile(dynamic=False)
        self.number = 0
        self.moving = False
        """Whether a step is changing the weights; if that fails, the state must not be saved."""
        self.gradients: GradientLog | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters."""
        return [*self.net.parameters(), *self.modules.parameters()]

    def optimizer_of(self, name: str) -> Optimizer:
        """Returns timm's optimizer of this name for all trained parameters.

        These are the shared weights, those that a width or a size has of its own, and the modules that only
        training needs. With Muon, which moves every matrix equally far, rates are relative (`rates.py`).
        """
        chosen = self.settings.optimizer
        optimizer = create_optimizer_v2(
            self.net.vit,
            opt=name,
            lr=self.rate,
            weight_decay=chosen.weight_decay,
            layer_decay=chosen.layer_decay,
        )
        self.add_own_vectors(optimizer)
        if trained := [*self.modules.parameters()]:
            optimizer.add_param_group({"params": trained, "lr": self.rate * self.method.module_rate})
        if has_relative_rates(name):
            make_relative(optimizer)
        return optimizer

    def add_own_vectors(self, optimizer: Optimizer) -> None:
        """Adds each width's and size's own vectors to the optimizer groups of the shared ones."""
        shared = dict(self.net.vit.named_parameters())
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for name, vector in [*self.net.vectors.items(), *self.net.positions.items()]:
            groups[id(shared[name.partition(":")[2]])]["params"].append(vector)

    def state(self) -> dict[str, Any]:
        """Returns the state from which `restore` resumes after the last step."""
        return {
            "step": self.number,
            "weights": self.net.state_dict(),
            "modules": self.modules.state_dict(),
            "average": self.average.module.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "statistics": self.statistics,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.number = state["step"]
        self.net.load_state_dict(state["weights"])
        self.modules.load_state_dict(state.get("modules", {}))
        self.optimizer.load_state_dict(state["optimizer"])
        self.statistics = {name: t.to(self.device) for name, t in state.get("statistics", {}).items()}
        if self.average:
            self.average.module.load_state_dict(state["average"])

    def __call__(self, images: Tensor, targets: Tensor) -> dict[str, float]:
        """Runs every pass of the method, then one step of the optimizer. Returns the loss of each pass.

        Args:
            images: (B, C, H, W), normalised; B is 0 if this process could read none, and then it only joins
                the collective operations.
            targets: (B,) class numbers.

        Raises:
            TrainingError: if a loss or the gradient is not finite; the weights are unchanged then.
            ScalaError: if memory is too small, or torch.compile fails.
        """
        with self.compiling, naming_lack_of_memory(len(images), remedy="smaller_step"):
            losses = self.gather_gradients(images, targets)
            if self.gradients:
                self.gradients.write(self.number)
            parameters = self.parameters
            self.world.average_gradients(parameters, len(images))
            norm = clip_grad_norm_(parameters, self.settings.optimizer.clip_grad or math.inf)
            # the only point of a step at which the CPU waits for the GPU
            *values, length = torch.stack([*losses.values(), norm]).tolist()
            numbers = dict(zip(losses, values, strict=True))
            self.refuse_infinite(numbers, length)
            self.moving = True
            with fast_muon(self.device):
                self.optimizer.step()
            self.optimizer.zero_grad()
            self.number += 1
            if self.average:
                self.average.update(self.net, self.number)
            # cached views expire with the weights' version, which not every GPU optimizer increments
            for parameter in self.evaluated.parameters():
                increment_version(parameter)
        self.moving, self.compiling = False, nullcontext()
        return numbers

    def refuse_infinite(self, losses: Mapping[str, float], norm: float) -> None:
        """Raises TrainingError if a loss, or the norm of the gradient, is not finite."""
        named = {f"the loss of width {name}": loss for name, loss in losses.items()}
        for name, value in {**named, "the gradient's norm": norm}.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"{name} is {value} at step {self.number + 1}.",
                    remedy="lower_rate",
                    rate=self.rate,
                )

    def gather_gradients(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Runs forward and backward of every pass of the method. Returns the losses."""
        random_seed((self.settings.run.seed * 1_000_003 + self.number) % 2**32)
        if not len(images):  # zero gradients, for the parameters that have one in the other processes
            blank = random_images(self.net.spec, 1).to(self.device)
            self.run_passes(blank, targets.new_zeros(1, dtype=torch.long).to(self.device), None)
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.zero_()
            return {}
        images = images.to(self.device, non_blocking=True)
        images, targets = self.mix(images, targets.to(self.device, non_blocking=True))
        return self.run_passes(images, targets, self.gradients)

    def run_passes(self, images: Tensor, targets: Tensor, log: GradientLog | None) -> dict[str, Tensor]:
        """Runs every pass on images and targets after mixup. Returns the losses.

        Args:
            log: records the gradient of each pass.
        """
        losses: dict[str, Tensor] = {}
        teacher = self.teach if self.frozen else None
        drawn = self.method.draw(Random(f"{self.settings.run.seed} {self.number}"))
        masked = hide_half(images, self.net.spec) if self.task.masks(self.settings.method) else ()
        for some in Batch(images, targets, *masked).parts(self.settings.optimizer.grad_accum_steps):
            if self.expert:
                some = some._replace(hints=self.expert(some.images))
            for point, loss, weight in self.method.passes(some, self.predict, teacher, drawn):
                share = loss * (len(some.images) / len(images))
                (share * weight).backward()
                losses[point.label] = losses.get(point.label, 0) + share.detach()
                if log:
                    log.add(point.label)
        return losses

    def measure(self, images: Iterable[Tensor]) -> None:
        """Lets the task compute statistics of the teacher's outputs, once before training.

        Args:
            images: batches (B, C, H, W), normalised, the same in every process.

        Raises DataError if all images are the same.
        """
        if self.frozen is not None:
            outputs = (self.answer(batch.to(self.device)) for batch in images)
            found = self.task.statistics(outputs, self.settings.method)
            self.statistics = {name: tensor.to(self.device) for name, tensor in found.items()}
            self.world.agree_on(self.statistics.values())

    def predict(self, images: Tensor, point: Point) -> Any:
        """Returns a point's output in float32 and in the task's units, such as logits (B, classes)."""
        return self.output_of(self.net.at(point), self.net.fitting(images, point))

    @torch.no_grad()
    def teach(self, images: Tensor) -> Any:
        """Returns the frozen starting model's output, in the form of `predict`."""
        assert self.frozen is not None
        return self.output_of(self.frozen, images)

    def output_of(self, vit: VisionTransformer, images: Tensor) -> Any:
        """Returns a model's output, in the form of `predict`."""
        with autocast(self.device, self.settings.device):
            output = self.run(vit, images)
        if not isinstance(output, BlockOutput):
            return self.task.standardised(output.float(), self.statistics)
        return BlockOutput(
            self.task.standardised(output.answer.float(), self.statistics),
            [tokens.float() for tokens in output.tokens],
            None if output.distilled is None else output.distilled.float(),
        )

    @torch.no_grad()
    def answer(self, images: Tensor) -> Tensor:
        """Returns the frozen starting model's output in float32, not standardised."""
        assert self.frozen is not None
        with autocast(self.device, self.settings.device):
            run = self.task.forward if self.method.reads_blocks else self.run
            return run(self.frozen, images).float()

    def observe(self, model: VisionTransformer, images: Tensor) -> BlockOutput:
        """Returns the output of a timm model and its patch tokens after every block."""
        vit: Any = model
        with reductions(vit) as reduced:
            normed, tokens = vit.forward_intermediates(images, output_fmt="NLC")
        head = getattr(vit, "head_dist", None)
        distilled = head(normed[:, 1]) if isinstance(head, nn.Linear) else None
        return BlockOutput(self.task.read(vit, normed, reduced), tokens, distilled)


def compiling(settings: Settings) -> AbstractContextManager[object]:
    """Returns a context for the first step that reports any error as torch.compile's, if that is on."""
    if not settings.optimizer.torchcompile:
        return nullcontext()
    return naming_failure("torch.compile failed", remedy="leave_out", setting="torchcompile")


def mixer(
    augment: AugmentSettings, smoothing: float, num_classes: int
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Returns a function that applies mixup and cutmix to a batch, if set.

    Both pair images, so an odd batch loses one image.
    """
    if not (augment.mixup or augment.cutmix):
        return lambda images, targets: (images, targets)
    mixup = Mixup(augment.mixup, augment.cutmix, label_smoothing=smoothing, num_classes=num_classes)

    def mix(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        even = len(images) // 2 * 2
        return mixup(images[:even], targets[:even]) if even else (images, targets)

    return mix


def refusing_settings() -> AbstractContextManager[object]:
    """Returns a context that reports any error as a TrainingError: timm rejects the settings."""
    return naming_failure("timm refuses these settings", kind=TrainingError, remedy="see_options")
