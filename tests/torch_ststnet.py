"""STSTNet in PyTorch, written from the description of the published weights; files of such weights."""

from pathlib import Path

import torch
from torch import nn

STREAMS = (3, 5, 8)


class TorchSTSTNet(nn.Module):
    """Conv 3x3 (padding 2), ReLU, BatchNorm, max-pool 3x3 (stride 3, padding 1), dropout in three streams; average
    pooling 2x2, flatten, Linear."""

    def __init__(self, channels=3, classes=3, streams=STREAMS):
        super().__init__()
        self.streams = len(streams)
        for number, features in enumerate(streams, start=1):
            setattr(self, f"conv{number}", nn.Conv2d(channels, features, kernel_size=3, padding=2))
            setattr(self, f"bn{number}", nn.BatchNorm2d(features))
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=3, padding=1)
        self.avgpool = nn.AvgPool2d(kernel_size=2, stride=2)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(5 * 5 * sum(streams), classes)

    def forward(self, x):
        """``(B, 3, 28, 28)`` to logits ``(B, 3)``."""
        outputs = []
        for number in range(1, self.streams + 1):
            y = getattr(self, f"bn{number}")(self.relu(getattr(self, f"conv{number}")(x)))
            outputs.append(self.dropout(self.maxpool(y)))
        return self.fc(self.avgpool(torch.cat(outputs, dim=1)).flatten(1))


def trained_network(seed: int) -> TorchSTSTNet:
    """A network whose BatchNorm has seen images of 8 bits, ready to predict."""
    torch.manual_seed(seed)
    network = TorchSTSTNet()
    for _ in range(3):
        network(torch.rand(16, 3, 28, 28) * 255)
    with torch.no_grad():
        for number in (1, 2, 3):
            getattr(network, f"bn{number}").weight.uniform_(0.5, 1.5)
            getattr(network, f"bn{number}").bias.uniform_(-0.5, 0.5)
    return network.eval()


def write_weights(folder: Path, subjects, zipped: bool = False) -> dict[str, TorchSTSTNet]:
    """Writes ``<subject>.pth`` as the published files are, in the older format; gives the networks."""
    folder.mkdir(parents=True, exist_ok=True)
    networks = {}
    for seed, subject in enumerate(subjects):
        networks[subject] = trained_network(seed)
        torch.save(networks[subject].state_dict(), folder / f"{subject}.pth", _use_new_zipfile_serialization=zipped)
    return networks
