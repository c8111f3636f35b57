"""The architectures of the zoo: random weights, small inputs.

torchvision, timm and transformers are in the extra ``zoo``. An installed torchvision that does not fit torch lacks two
operators that no classifier needs; they are declared first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ARCHITECTURES", "FAMILIES", "build", "first_output", "size"]

Made = tuple[nn.Module, tuple[Tensor, ...]]
_LIBRARIES: list[Any] = []


def _declare_torchvision_operators() -> None:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARIES.append(library)  # kept alive


_declare_torchvision_operators()


def _torchvision(name: str, size: int = 64, **arguments: Any) -> Callable[[], Made]:
    def make() -> Made:
        import torchvision

        return torchvision.models.get_model(name, weights=None, **arguments), (torch.randn(2, 3, size, size),)

    return make


def _video(name: str) -> Callable[[], Made]:
    def make() -> Made:
        import torchvision

        return torchvision.models.get_model(name, weights=None), (torch.randn(2, 3, 8, 32, 32),)

    return make


def _timm(name: str, size: int = 64, **arguments: Any) -> Callable[[], Made]:
    def make() -> Made:
        import timm

        return timm.create_model(name, pretrained=False, **arguments), (torch.randn(2, 3, size, size),)

    return make


class _Logits(nn.Module):
    """A transformers model whose output is one tensor."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, inputs: Tensor) -> Tensor:
        return getattr(self.model(inputs), self.output)


def _transformers(
    model: str, config: str, output: str = "logits", image: int = 0, **arguments: Any
) -> Callable[[], Made]:
    def make() -> Made:
        import transformers

        made = getattr(transformers, model)(getattr(transformers, config)(**arguments))
        inputs = torch.randn(2, 3, image, image) if image else torch.randint(0, 90, (2, 12))
        return _Logits(made, output), (inputs,)

    return make


_TEXT = {
    "vocab_size": 100,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
_LLAMA = {**_TEXT, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
_IMAGE = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
}


def _own(name: str) -> Callable[[], Made]:
    def make() -> Made:
        import zoo_networks

        return getattr(zoo_networks, name)()

    return make


_TORCHVISION = """
    alexnet vgg11 vgg16_bn resnet18 resnet50 resnet152 resnext50_32x4d wide_resnet50_2 densenet121 densenet161
    squeezenet1_0 squeezenet1_1 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large shufflenet_v2_x0_5 shufflenet_v2_x1_0
    shufflenet_v2_x2_0 mnasnet0_5 mnasnet1_0 efficientnet_b0 efficientnet_b1 efficientnet_v2_s regnet_x_400mf
    regnet_y_400mf regnet_y_800mf convnext_tiny convnext_small
"""

_TIMM = """
    resnet26d resnest14d res2net50_26w_4s res2next50 seresnet50 skresnet18 ecaresnet26t gcresnet33ts dpn68 dla34
    dla60_res2net cspresnet50 cspdarknet53 cs3darknet_s vovnet39a hrnet_w18_small ghostnet_100 ghostnetv2_100 tinynet_e
    mixnet_s lcnet_050 fbnetc_100 rexnet_100 mobileone_s0 repvgg_a0 selecsls42b nfnet_l0 hardcorenas_a edgenext_xx_small
    fastvit_t8 mobilevit_xxs mobilevitv2_050 convmixer_768_32 poolformer_s12 caformer_s18 convformer_s18
    inception_next_tiny convnextv2_atto
"""

ARCHITECTURES: dict[str, Callable[[], Made]] = {
    **{f"torchvision/{name}": _torchvision(name) for name in _TORCHVISION.split()},
    "torchvision/googlenet": _torchvision("googlenet", aux_logits=False, init_weights=False),
    "torchvision/inception_v3": _torchvision("inception_v3", 96, aux_logits=False, init_weights=False),
    "torchvision/vit_b_16": _torchvision("vit_b_16", image_size=64),
    "torchvision/vit_l_16": _torchvision("vit_l_16", image_size=64),
    "torchvision/swin_t": _torchvision("swin_t"),
    "torchvision/swin_b": _torchvision("swin_b"),
    "torchvision/swin_v2_t": _torchvision("swin_v2_t"),
    "torchvision/maxvit_t": _torchvision("maxvit_t", 224),
    "torchvision/r3d_18": _video("r3d_18"),
    "torchvision/mc3_18": _video("mc3_18"),
    "torchvision/r2plus1d_18": _video("r2plus1d_18"),
    **{f"timm/{name}": _timm(name) for name in _TIMM.split()},
    "timm/vit_tiny_patch16": _timm("vit_tiny_patch16_224", img_size=64),
    "timm/deit3_small_patch16": _timm("deit3_small_patch16_224", img_size=64),
    "timm/mixer_s16": _timm("mixer_s16_224", img_size=64),
    "timm/resmlp_12": _timm("resmlp_12_224", img_size=64),
    "timm/gmlp_s16": _timm("gmlp_s16_224", img_size=64),
    "timm/pit_ti": _timm("pit_ti_224", img_size=64),
    "timm/cait_xxs24": _timm("cait_xxs24_224", img_size=64),
    "timm/xcit_nano": _timm("xcit_nano_12_p16_224", img_size=64),
    "timm/coat_lite_tiny": _timm("coat_lite_tiny", 224),
    "timm/crossvit_tiny": _timm("crossvit_tiny_240", 240),
    "timm/swin_tiny": _timm("swin_tiny_patch4_window7_224", 224),
    "timm/pvt_v2_b0": _timm("pvt_v2_b0"),
    "timm/twins_svt_small": _timm("twins_svt_small", 224),
    "timm/davit_tiny": _timm("davit_tiny", 224),
    "timm/focalnet_tiny": _timm("focalnet_tiny_srf", 224),
    "timm/tiny_vit_5m": _timm("tiny_vit_5m_224", 224),
    "timm/beit_base": _timm("beit_base_patch16_224", img_size=64),
    "timm/efficientformer_l1": _timm("efficientformer_l1", 224),
    "timm/levit_128s": _timm("levit_128s", 224),
    "timm/eva02_tiny": _timm("eva02_tiny_patch14_224", 56, img_size=56),
    "timm/nest_tiny": _timm("nest_tiny", 224),
    "timm/efficientvit_b0": _timm("efficientvit_b0"),
    "transformers/bert": _transformers("BertForSequenceClassification", "BertConfig", **_TEXT),
    "transformers/roberta": _transformers("RobertaForSequenceClassification", "RobertaConfig", **_TEXT),
    "transformers/distilbert": _transformers(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        vocab_size=100,
        dim=48,
        n_layers=2,
        n_heads=4,
        hidden_dim=96,
    ),
    "transformers/albert": _transformers("AlbertForSequenceClassification", "AlbertConfig", embedding_size=24, **_TEXT),
    "transformers/electra": _transformers(
        "ElectraForSequenceClassification", "ElectraConfig", embedding_size=24, **_TEXT
    ),
    "transformers/deberta_v2": _transformers("DebertaV2ForSequenceClassification", "DebertaV2Config", **_TEXT),
    "transformers/gpt2": _transformers(
        "GPT2LMHeadModel", "GPT2Config", vocab_size=100, n_embd=48, n_layer=2, n_head=4, n_positions=32, use_cache=False
    ),
    "transformers/llama": _transformers("LlamaForCausalLM", "LlamaConfig", use_cache=False, **_LLAMA),
    "transformers/qwen2": _transformers("Qwen2ForCausalLM", "Qwen2Config", use_cache=False, **_LLAMA),
    "transformers/mistral": _transformers("MistralForCausalLM", "MistralConfig", use_cache=False, **_LLAMA),
    "transformers/vit": _transformers("ViTForImageClassification", "ViTConfig", image=32, patch_size=8, **_IMAGE),
    "transformers/deit": _transformers("DeiTForImageClassification", "DeiTConfig", image=32, patch_size=8, **_IMAGE),
    "transformers/dinov2": _transformers(
        "Dinov2ForImageClassification",
        "Dinov2Config",
        image=32,
        patch_size=8,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
    ),
    "transformers/bert_12_layers": _transformers(
        "BertForSequenceClassification", "BertConfig", vocab_size=30522, num_hidden_layers=12
    ),
    "own/lstm": _own("lstm"),
    "own/gru_two_layers": _own("gru"),
    "own/conv1d": _own("conv1d"),
    "own/grouped_queries": _own("grouped_queries"),
    "own/unet": _own("unet"),
    "own/weight_norm": _own("weight_norm"),
}

FAMILIES = (
    "torchvision/resnet18",
    "torchvision/mobilenet_v2",
    "torchvision/densenet121",
    "torchvision/shufflenet_v2_x0_5",
    "timm/convnextv2_atto",
    "timm/vit_tiny_patch16",
    "transformers/bert",
    "transformers/llama",
    "own/lstm",
    "own/gru_two_layers",
    "own/conv1d",
    "own/unet",
)
"""What every criterion, allocation and target is tried on."""


def build(name: str) -> Made:
    """Return an architecture with random weights, in eval mode, and small inputs."""
    torch.manual_seed(0)
    network, inputs = ARCHITECTURES[name]()
    return network.eval(), inputs


def first_output(outputs: Any) -> Tensor:
    """Return the first tensor of what a network returns."""
    if isinstance(outputs, Tensor):
        return outputs
    return first_output(next(iter(outputs.values() if isinstance(outputs, dict) else outputs)))


def size(network: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in network.parameters())
