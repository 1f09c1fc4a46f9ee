"""Raw images with class numbers: from timm or torchvision readers, as subsets, or renumbered."""

from collections.abc import Sequence
from typing import Any, Protocol

from scala_cli.data.images import open_image


class Samples(Protocol):
    """Raw images with class numbers, before any transform."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Any, int]: ...
    def name(self, index: int) -> str: ...


class FromReader:
    """The samples of a timm reader such as hfds."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        file, target = self.reader[index][:2]
        return open_image(file), target

    def name(self, index: int) -> str:
        return self.reader.filename(index, absolute=True) or f"image {index}"  # table rows have no name


class FromDataset:
    """The samples of a data set that opens its images itself, like torchvision's."""

    def __init__(self, dataset: Any, label: str) -> None:
        self.dataset, self.label = dataset, label

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.dataset[index]

    def name(self, index: int) -> str:
        return f"{self.label}[{index}]"


class Renumbered:
    """Samples with class n renumbered to `numbers[n]`."""

    def __init__(self, samples: Samples, numbers: Sequence[int]) -> None:
        self.samples, self.numbers = samples, numbers

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, target = self.samples[index]
        return image, self.numbers[target]

    def name(self, index: int) -> str:
        return self.samples.name(index)


class Unlabelled:
    """Samples without their labels: each has class number 0."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.samples[index][0], 0

    def name(self, index: int) -> str:
        return self.samples.name(index)


class Some:
    """A subset of samples, by index."""

    def __init__(self, samples: Samples, numbers: Sequence[int]) -> None:
        self.samples, self.numbers = samples, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.samples[self.numbers[index]]

    def name(self, index: int) -> str:
        return self.samples.name(self.numbers[index])
