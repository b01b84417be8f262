"""SAM-Med2D's adapter: channel attention, then a spatial bottleneck, beside each block's MLP.

Source: SAM-Med2D (arXiv 2308.16184); keys as in its published checkpoint. It normalises its own output.
"""

from __future__ import annotations

from torch import Tensor, nn


class Adapter(nn.Module):
    """[B, H, W, C] float to the same; H and W even."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.channel = nn.Sequential(
            nn.Linear(dim, dim // 4, bias=False),
            nn.ReLU(),
            nn.Linear(dim // 4, dim, bias=False),
            nn.Sigmoid(),
        )
        self.spatial = nn.Sequential(
            nn.Conv2d(dim, dim, 3, stride=2, padding=1, bias=False),
            nn.ReLU(),
            nn.ConvTranspose2d(dim, dim, 4, stride=2, padding=1, bias=False),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        gate = self.channel(x.mean(dim=(1, 2)))
        gated = (x * gate[:, None, None, :]).permute(0, 3, 1, 2)
        result: Tensor = self.norm(x + self.spatial(gated).permute(0, 2, 3, 1))
        return result
