from scala_cli.cli.console import Output
from scala_cli.cli.options import Checkpoint, Data, Some
from scala_cli.models.locate import resolve
from scala_cli.settings import DeviceSettings, EvalSettings, ReadSettings
from scala_cli.slicing.point import choose_points


def evaluate(
    checkpoint: Checkpoint = None,
    *,
    data: Data,
    ratio: Some = None,
    settings: EvalSettings,
    read: ReadSettings,
    device: DeviceSettings,
    out: Output,
) -> None:
    """Accuracy of every width on the validation images.

    Example: scala eval runs/last --data DIR --ratio 0.5
    """
    directory = resolve(checkpoint)

    from scala_cli.device import choose_device, uses_bfloat16
    from scala_cli.evaluate import evaluate, validation_loader
    from scala_cli.models.checkpoint import load_with_record
    from scala_cli.models.vit import choose_attention

    place = choose_device(device)
    net, _ = load_with_record(directory)
    choose_attention(net.vit, place, uses_bfloat16(place, device))
    points = choose_points(ratio, net.points)
    loader = validation_loader(net, data, settings.batch_size, read)
    with out.progress() as live:
        rows = evaluate(net.to(place), loader, points, device, live)
        loader.tell_skipped(live)
    out.result({"points": rows, "skipped": list(loader.skipped)}, rows)
