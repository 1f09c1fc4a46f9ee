"""timm's transformer block, able to compute only the tokens that the head reads."""

from typing import Any

from timm.models.vision_transformer import Block
from torch import Tensor
from torch.nn import functional as F


class SlimBlock(Block):
    """timm's block bit for bit, unless `read` says that only the first tokens are needed.

    Pass this class to timm as `block_fn` to build a model of these blocks.
    """

    read: int | None = None
    """How many tokens, from the first on, the block computes; None computes all. They attend to all."""

    def forward(self, x: Tensor, *masks: Any, **named: Any) -> Tensor:
        """(B, N, C) -> (B, N, C), or (B, read, C)"""
        if self.read is None:
            return super().forward(x, *masks, **named)
        x = x[:, : self.read] + self.drop_path1(self.ls1(self.attend(self.norm1(x), self.read)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def attend(self, x: Tensor, read: int) -> Tensor:
        """(B, N, C) -> (B, read, C): attention whose queries are the first tokens alone.

        torch's attention accepts fewer queries than keys. For so few, explicit attention, which computes the
        attention weights, is at least as fast as the fused kernel (docs/performance.md).
        """
        attn: Any = self.attn
        tokens = x.transpose(0, 1)
        attended, _ = F.multi_head_attention_forward(
            tokens[:read],
            tokens,
            tokens,
            attn.attn_dim,
            attn.num_heads,
            attn.qkv.weight,
            attn.qkv.bias,
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=attn.attn_drop.p,
            out_proj_weight=attn.proj.weight,
            out_proj_bias=attn.proj.bias,
            training=self.training,
            average_attn_weights=False,
        )
        return attn.proj_drop(attended.transpose(0, 1))
