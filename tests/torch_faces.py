"""The face regressors in PyTorch, from timm and torchvision and the description of their checkpoints."""

import importlib.util
import warnings
from pathlib import Path

import torch
from torch import nn

_spec = importlib.util.spec_from_file_location("torch_vision", Path(__file__).with_name("torch_vision.py"))
_torch_vision = importlib.util.module_from_spec(_spec)  # kept: see there
_spec.loader.exec_module(_torch_vision)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import timm
    from torchvision.models import resnet

DDFA_HEADS = (80, 64, 80, 3, 27, 2, 1)
FACEVERSE_HEADS = (156, 177, 251, 27, 3, 2, 1, 4)


def mobilenet(size: str) -> nn.Module:
    """The minimal MobileNetV3, ``'large'`` or ``'small'``: images ``(B, 3, H, W)`` to a list of feature maps."""
    return timm.create_model(f"tf_mobilenetv3_{size}_minimal_100", pretrained=False, features_only=True)


def bottlenecks(blocks: tuple[int, ...]) -> nn.Module:
    """A ResNet of bottlenecks; ``(3, 4, 6, 3)`` is ResNet-50."""
    return resnet.ResNet(resnet.Bottleneck, list(blocks))


class TorchEncoder(nn.Module):
    """One of SMIRK's encoders; ``head`` names its linear layer."""

    def __init__(self, size, outputs, head):
        super().__init__()
        self.encoder = mobilenet(size)
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
        self.backbone = bottlenecks(blocks)
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
