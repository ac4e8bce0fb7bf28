"""The face regressors in PyTorch, from timm and torchvision and the description of their checkpoints.

A packaged torchvision may be a CUDA build whose own library a CPU torch cannot load; importing it, and with it timm, then
fails on two operators that nothing here needs. They are declared first.
"""

from pathlib import Path

import torch

try:
    _operators = torch.library.Library("torchvision", "FRAGMENT")  # kept: it undeclares with its last reference
    for _name in ("nms", "qnms"):
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
except RuntimeError:  # declared already
    pass

import timm
import torchvision
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

DDFA_HEADS = (80, 64, 80, 3, 27, 2, 1)
FACEVERSE_HEADS = (156, 177, 251, 27, 3, 2, 1, 4)


class TorchEncoder(nn.Module):
    """One of SMIRK's encoders; ``head`` names its linear layer."""

    def __init__(self, size, outputs, head):
        super().__init__()
        self.encoder = timm.create_model(f"tf_mobilenetv3_{size}_minimal_100", pretrained=False, features_only=True)
        self.head = head
        setattr(self, head, nn.Sequential(nn.Linear(self.encoder.feature_info[-1]["num_chs"], outputs)))

    def forward(self, images):
        """``(B, 3, H, W)`` to what the linear layer gives."""
        return getattr(self, self.head)(self.encoder(images)[-1].mean(dim=(2, 3)))


class TorchSmirk(nn.Module):
    """SMIRK's encoders."""

    def __init__(self):
        super().__init__()
        self.pose_encoder = TorchEncoder("small", 6, "pose_cam_layers")
        self.shape_encoder = TorchEncoder("large", 300, "shape_layers")
        self.expression_encoder = TorchEncoder("large", 55, "expression_layers")

    def forward(self, images):
        """``(B, 3, H, W)`` to expression, eyelids, jaw, pose, camera and shape."""
        found = self.expression_encoder(images)
        return torch.cat(
            [
                found[:, :50],
                torch.clamp(found[:, 50:52], 0, 1),
                torch.relu(found[:, 52:53]),
                torch.clamp(found[:, 53:], -0.2, 0.2),
                self.pose_encoder(images),
                self.shape_encoder(images),
            ],
            dim=1,
        )


class TorchRegressor(nn.Module):
    """A ResNet of bottlenecks without its classifier, and 1 x 1 convolutions as heads."""

    def __init__(self, heads, blocks=(3, 4, 6, 3)):
        super().__init__()
        self.backbone = torchvision.models.resnet50() if blocks == (3, 4, 6, 3) else ResNet(Bottleneck, list(blocks))
        del self.backbone.fc
        self.final_layers = nn.ModuleList([nn.Conv2d(2048, size, 1) for size in heads])

    def forward(self, images):
        """``(B, 3, H, W)`` to all coefficients."""
        net = self.backbone
        x = net.maxpool(torch.relu(net.bn1(net.conv1(images))))
        x = net.avgpool(net.layer4(net.layer3(net.layer2(net.layer1(x)))))
        return torch.cat([layer(x) for layer in self.final_layers], dim=1).flatten(1)


def randomise(network, seed=0):
    """Random statistics and scales for every normalisation, as no network at its start has them; for evaluation."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor, low, high):
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                uniform(module.weight, 0.5, 1.5)
                uniform(module.bias, -0.5, 0.5)
                uniform(module.running_mean, -0.5, 0.5)
                uniform(module.running_var, 0.5, 1.5)
    return network.eval()


def save_smirk(network, path: Path) -> Path:
    """As ``SMIRK_em1.pt``: encoders and generator in one plain dict."""
    state = {f"smirk_encoder.{name}": tensor for name, tensor in network.state_dict().items()}
    state["smirk_generator.encoder1.enc1conv1.weight"] = torch.rand(32, 6, 3, 3)
    state["smirk_generator.conv.bias"] = torch.rand(3)
    torch.save(state, path)
    return path
