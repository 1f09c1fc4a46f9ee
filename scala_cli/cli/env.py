from scala_cli.cli.console import Output


def env(*, out: Output) -> None:
    """Show this machine's versions, device, threads and precision.

    Example: scala env --json
    """
    import platform

    import torch

    from scala_cli.device import choose_device, device_name
    from scala_cli.models.checkpoint import versions
    from scala_cli.precision import uses_bfloat16
    from scala_cli.settings import DeviceSettings

    device = choose_device(DeviceSettings())
    facts = {
        "python": platform.python_version(),
        **versions(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": str(device),
        "processor": device_name(device),
        "threads": torch.get_num_threads(),
        "trains in": "bfloat16" if uses_bfloat16(device, DeviceSettings()) else "float32",
    }
    out.result(facts, [])
