"""Exports one width, or all of them, to a format for another runtime."""

import json
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scala_cli.errors import CheckpointError, ScalaError
from scala_cli.files import (
    refuse_existing,
    refuse_occupied,
    refuse_unwritable,
    whole_directory,
    whole_files,
)
from scala_cli.formats import (
    LOGITS,
    Format,
    format_named,
    is_int8,
    is_onnx,
    opened,
    opset_in,
    opset_of,
    refuse_opset,
    to_onnx,
    write,
)
from scala_cli.models.checkpoint import copy_files
from scala_cli.models.dense import WithTokens, reader_of
from scala_cli.models.fit import explained
from scala_cli.models.locate import CONFIG, EXTRA, WEIGHTS
from scala_cli.models.slimmable import Ratio, SlimmableViT
from scala_cli.models.views import fill, weights_of
from scala_cli.models.vit import Spec
from scala_cli.slicing.own import at_size, own_vectors
from scala_cli.slicing.point import Point
from scala_cli.timing import Predictor
from scala_cli.watch import QUIET, Watcher

EXPORT_TOLERANCE = 1e-4
"""Largest difference in float32 between the outputs of torch and of another runtime, relative to their root
mean square if that is above one."""
AGREEMENT = 0.9
"""Least share of real images whose class 8-bit weights must keep; for features, the least R²."""


class FromPixels(nn.Module):
    """A model that normalises its input: pixels from 0 to 255, (B, C, H, W) uint8.

    Raises CheckpointError as `channel_values`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, spec: Spec) -> None:
        super().__init__()
        self.model = model
        for name in ("mean", "std"):
            channels = torch.tensor(channel_values(spec, name), dtype=torch.float32)
            self.register_buffer(name, channels[:, None, None])

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model((pixels.float() / 255 - self.mean) / self.std)

    def pixels_of(self, images: Tensor) -> Tensor:
        """Returns the pixels that normalising turns into `images`, up to rounding."""
        return ((images * self.std + self.mean) * 255).round().clamp(0, 255).to(torch.uint8)


def channel_values(spec: Spec, name: str) -> tuple[float, ...]:
    """Returns the mean or the deviation (`name`) of each input channel of a model.

    Raises CheckpointError if its settings hold another number of values, unless these are all equal.
    """
    values, count = tuple(spec.pretrained_cfg[name]), spec.input_size[0]
    if len(values) != count and len({*values}) != 1:
        told = ", ".join(f"{value:g}" for value in values)
        raise CheckpointError(
            f"the model takes {count} channels, but its {name} has {len(values)} values: {told}.",
            remedy="normalise_yourself",
        )
    return values if len(values) == count else values[:1] * count


@dataclass(frozen=True)
class Difference:
    """How another runtime's outputs for the same images differ from torch's.

    Args:
        largest: the largest difference.
        relative: the largest difference, relative to the output's root mean square if that is above one.
        same_top1: the share of images with the same class.
        r2: R² of the other runtime's first output; None if torch's is the same for all images.
    """

    largest: float
    relative: float
    same_top1: float
    r2: float | None

    @classmethod
    @torch.inference_mode()
    def between(cls, model: Predictor, again: Predictor, images: Tensor) -> "Difference":
        """Compares all outputs, in batches of 32; the last may be smaller, as a user's batches may be."""
        ours, theirs = (outputs_of(run, images.split(32)) for run in (model, again))
        same = (ours[0].argmax(1) == theirs[0].argmax(1)).float().mean().item()
        differences = torch.stack([(a - b).abs().max() for a, b in zip(ours, theirs, strict=True)])
        sizes = torch.stack([output.square().mean().sqrt() for output in ours]).clamp_min(1)
        r2 = explained(theirs[0], ours[0])
        return cls(
            differences.max().item(),
            (differences / sizes).max().item(),
            round(same, 4),
            None if r2 is None else round(r2, 4),
        )


def outputs_of(run: Callable[[Tensor], Any], batches: Iterable[Tensor]) -> list[Tensor]:
    """Returns each output of a model, concatenated over all batches."""
    found = [run(images) for images in batches]
    return [
        torch.cat(part) for part in zip(*(x if isinstance(x, tuple) else (x,) for x in found), strict=True)
    ]


@torch.no_grad()
def export(
    net: SlimmableViT,
    ratio: Ratio,
    kind: str,
    target: Path,
    images: Tensor,
    *,
    real: bool = False,
    pixels: bool = False,
    outputs: str | None = None,
    opset: int | None = None,
    force: bool = False,
    watch: Watcher = QUIET,
) -> dict[str, Any]:
    """Writes one width in a format, once the file gives the same outputs in its own runtime.

    Args:
        kind: a name of `formats.FORMATS`.
        images: (B, C, H, W), normalised, on which the runtime is compared with torch.
        real: whether `images` are photographs, not noise; then 8-bit weights must keep most of their classes,
            or nearly their features.
        pixels: the file takes pixels from 0 to 255, uint8, and normalises them itself.
        outputs: "features,tokens", or "logits,tokens" if the model has a classifier, for a file with two
            outputs: the model's, and the features of its patches (B, N, C), as `SlimmableViT.features`.
        opset: ONNX opset; None for the exporter's choice.

    Returns:
        {"path", "format", "ratio", "max_abs_diff", "same_top1", "images", "bytes"}; for features "r2" instead
        of "same_top1"; for ONNX also "opset".

    Raises:
        ScalaError: a missing package, or outputs that the model does not have.
        PointError: a width that was not trained.
        CheckpointError: the runtime's outputs differ from torch's; then no file is left behind.
    """
    chosen = format_named(kind)
    refuse_opset(opset)
    names = output_names(net.spec, outputs)
    refuse_file(target, chosen, force)
    point = net.find(ratio)
    vit = net.slice(point, fixed_size=True)
    model: nn.Module = WithTokens(vit, reader_of(net, vit, point.ratio)).eval() if outputs else vit
    if pixels:
        model = FromPixels(model, net.spec).eval()
        images = model.pixels_of(images)
    watch.phase("export", 2, "steps")
    with whole_files(target, force) as fresh:
        file = fresh / target.name
        write(kind, model, twice(images[:1]), file, net.spec.label_names or (), opset, names)
        watch.step(1)
        found = Difference.between(model, opened(kind, file), images)
        watch.step(1)
        refuse_difference(found, kind, real, net.spec.features)
        size = sum(part.stat().st_size for part in fresh.iterdir())
        written_in = {"opset": opset_in(file)} if is_onnx(kind) else {}
    return {
        "path": str(target),
        "format": kind,
        **written_in,
        **point.columns(),
        "max_abs_diff": found.largest,
        **({"r2": found.r2} if net.spec.features else {"same_top1": found.same_top1}),
        "images": len(images),
        "bytes": size,
    }


def output_names(spec: Spec, asked: str | None) -> Sequence[str]:
    """Returns the names of a file's outputs. Raises ScalaError if the model does not have them."""
    both = f"{'features' if spec.features else 'logits'},tokens"
    if asked not in (None, both):
        raise ScalaError(
            f"this model has no outputs {asked!r}; it has {both}.",
            remedy="try",
            setting="outputs",
            value=both,
        )
    return asked.split(",") if asked else LOGITS


class AtWidth(nn.Module):
    """A family at one width, with the full weights as its parameters, under their own names."""

    def __init__(self, net: SlimmableViT, point: Point) -> None:
        super().__init__()
        full = net.spec.build_with(net.vit.state_dict())  # a new model, so changes of mode do not reach `net`
        for name, part in full.named_children():
            self.add_module(name, part)
        for name, parameter in full.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        extra = {name: tensor.detach() for name, tensor in net.extra.items()}
        own = own_vectors(extra, point.ratio)
        self.cut = lambda state: net.rule.slice_state(at_size(state, extra, point.size), point.ratio, own=own)
        # in a list, so that its parameters do not count as this model's
        self.skeleton = [net.spec_at(point).of_fixed_size().build()]

    def forward(self, images: Tensor) -> Tensor:
        (skeleton,) = self.skeleton
        fill(skeleton, self.cut(weights_of(self)))
        return skeleton(images)


@torch.no_grad()
def export_all(
    net: SlimmableViT,
    checkpoint: Path,
    target: Path,
    images: Tensor,
    *,
    opset: int | None = None,
    force: bool = False,
    watch: Watcher = QUIET,
) -> dict[str, Any]:
    """Writes every width as an ONNX graph over one copy of the weights.

    The weights are the checkpoint's own model.safetensors: each graph refers to tensors in that file and cuts
    them itself. With config.json the folder is still a checkpoint.

    Args:
        checkpoint: the directory that `net` was loaded from.
        opset: as in `export`.

    Returns:
        {"path", "format", "opset", "bytes", "bytes_of_full", "points": [{"ratio", "file", "max_abs_diff"}]};
        "bytes" of the folder, "bytes_of_full" of the weights and the graph of the widest width.

    Raises as `export`.
    """
    format_named("onnx")
    refuse_opset(opset)
    import onnx_ir

    names = {point: f"{point.file_name}.onnx" for point in net.points}
    refuse_occupied(target, force, {CONFIG, WEIGHTS, EXTRA, *names.values()}, source=checkpoint)
    watch.phase("export", len(net.points), "widths")
    rows = []
    with whole_directory(target) as fresh:
        copy_files(checkpoint, fresh)
        places = places_of(fresh / WEIGHTS)
        for point, name in names.items():
            model = AtWidth(net, point).eval()
            # not optimised: that would store each cut as a tensor of its own
            there, labels = net.fitting(images, point), net.spec.label_names or ()
            graph = to_onnx(model, twice(there[:1]), labels, opset, optimize=False)
            for initializer, value in graph.graph.initializers.items():
                if initializer in places:
                    place = (WEIGHTS, *places[initializer], value.dtype)
                    value.const_value = onnx_ir.ExternalTensor(
                        *place, shape=value.shape, name=initializer, base_dir=fresh
                    )
            onnx_ir.save(graph, fresh / name)
            ours: Predictor = partial(net, ratio=point)
            found = Difference.between(ours, opened("onnx", fresh / name), there)
            refuse_difference(found, "onnx")
            rows.append({**point.columns(), "file": name, "max_abs_diff": found.largest})
            watch.step(1)
        sizes = {file.name: file.stat().st_size for file in fresh.iterdir()}
    full = sizes[WEIGHTS] + sizes[names[net.widest]]
    return {
        "path": str(target),
        "format": "onnx",
        "opset": opset_of(graph),
        "bytes": sum(sizes.values()),
        "bytes_of_full": full,
        "points": rows,
    }


def twice(image: Tensor) -> Tensor:
    """Returns a batch of two: exporters take a batch size of one as fixed."""
    return torch.cat([image, image])


def places_of(file: Path) -> dict[str, tuple[int, int]]:
    """Returns the position of each tensor in a safetensors file: (first byte, number of bytes)."""
    with file.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        header = json.loads(handle.read(length))
    begins = 8 + length
    header.pop("__metadata__", None)
    spans = {name: about["data_offsets"] for name, about in header.items()}
    return {name: (begins + first, last - first) for name, (first, last) in spans.items()}


def refuse_file(target: Path, chosen: Format, force: bool) -> None:
    """Raises ScalaError unless a file of the format can be written there."""
    refuse_unwritable(target)
    if target.suffix != chosen.suffix:
        better = target.with_name(target.name + chosen.suffix)
        raise ScalaError(f"{target} does not end in {chosen.suffix}.", remedy="name_file", file=better)
    refuse_existing(target, force)


def refuse_difference(found: Difference, kind: str, real: bool = False, features: bool = False) -> None:
    """Raises CheckpointError if another runtime's outputs differ too much from torch's.

    Args:
        real: whether the images were photographs; only on these are 8-bit weights judged.
        features: whether the outputs are features, not classes.
    """
    if is_int8(kind):
        kept = (found.r2 or 0.0) if features else found.same_top1
        good = math.isfinite(found.largest) and (not real or kept >= AGREEMENT)
        what = (
            f"gives features whose R² is {kept:.2f}, below {AGREEMENT:g}"
            if features
            else f"gives another class to {1 - kept:.0%} of the images"
        )
    else:
        good = found.relative <= EXPORT_TOLERANCE
        what = f"differs by {found.relative:.2g}, more than {EXPORT_TOLERANCE:g}"
    if good:
        return
    message = f"the {kind} file read back by its runtime {what}; nothing was written."
    if is_int8(kind):
        raise CheckpointError(message, remedy="leave_out", setting="int8")
    raise CheckpointError(message, remedy="report")
