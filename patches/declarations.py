"""What of transformers' architectures cannot be read from the modules and their configs: a line where it is needed.

A model type without a line is patched by what its modules say: the classes whose forward asks transformers'
`AttentionInterface` for its attention, without cross-attention, with the sizes that they name.
"""

from ..architecture import Architecture
from . import bloom, codegen, deberta_v2, falcon, gpt_neo, gptj, mpt, rembert, roformer, xlm

# Attention off the interface that has something to say of its own: one file a family
_FAMILIES = (bloom, codegen, deberta_v2, falcon, gpt_neo, gptj, mpt, rembert, roformer, xlm)

# fmt: off
_TABLE = (
    # Keys that are not the tokens, in some layers
    Architecture("deepseek_v4", attention="DeepseekV4Attention", unless="compressor"),
    Architecture("segformer", attention="SegformerAttention", unless="sequence_reduction_ratio"),
    # A decoder by its name, for the sake of its cross-attention, that sees everything
    Architecture(
        "bridgetower", attention=("BridgeTowerSelfAttention",), causal=False, exclude=r"crossattention",
    ),
    # Off the interface
    Architecture("gpt_neox_japanese", attention="GPTNeoXJapaneseAttention", routed=True, causal=True),
    Architecture("openai-gpt", attention="Attention", routed=True, causal=True),
    Architecture("xglm", attention="XGLMAttention", routed=True, causal=True, scaling=1.0),
    Architecture("trocr", attention="TrOCRAttention", routed=True, causal="is_decoder", scaling=1.0),
    Architecture("megatron-bert", attention="MegatronBertSelfAttention", routed=True, causal="is_decoder"),
    Architecture("mvp", attention="MvpAttention", routed=True, causal="is_decoder", scaling=1.0),
    Architecture("cpmant", attention="CpmAntAttention", head_dim="dim_head", routed=True, bias=True),
    Architecture("blip", attention=("BlipAttention", "BlipTextSelfAttention"), routed=True, causal="is_decoder"),
    Architecture("bros", attention="BrosSelfAttention", routed=True, bias=True),
    Architecture("canine", attention="CanineSelfAttention", routed=True),
    Architecture("clvp", attention="ClvpSelfAttention", routed=True, causal="is_decoder"),
    Architecture(
        "data2vec-vision",
        attention=("Data2VecVisionSelfAttention", "Data2VecVisionSdpaSelfAttention"),
        routed=True,
        bias=True,
    ),
    Architecture("deberta", attention="DisentangledSelfAttention", routed=True, scaling=1.0, bias=True),
    Architecture("flava", attention="FlavaSelfAttention", routed=True),
    Architecture("git", attention="GitSelfAttention", routed=True, causal=True, parts=(
        Architecture("git_vision_model", attention="GitVisionAttention"),
    )),
    Architecture("groupvit", attention="GroupViTAttention", exclude="pre_assign_attn", routed=True, scaling=1.0),
    Architecture("ibert", attention="IBertSelfAttention", routed=True),
    Architecture("imagegpt", attention="ImageGPTAttention", routed=True, causal=True),
    Architecture("layoutlmv3", attention="LayoutLMv3SelfAttention", routed=True, bias=True),
    Architecture("lilt", attention="LiltSelfAttention", routed=True),
    Architecture("luke", attention="LukeSelfAttention", routed=True, bias=True),
    Architecture("lxmert", attention="LxmertAttention", routed=True, exclude="x_layers.*visual_attention"),
    Architecture("mgp-str", attention="MgpstrAttention", routed=True, scaling="scale"),
    Architecture("mpnet", attention="MPNetSelfAttention", routed=True, bias=True),
    Architecture("pvt", attention="PvtEfficientSelfAttention", routed=True, unless="sequences_reduction_ratio"),
    Architecture("seggpt", attention="SegGptAttention", routed=True, scaling=1.0, bias=True),
    Architecture("speecht5", attention="SpeechT5Attention", routed=True, causal="is_decoder", scaling=1.0, bias=True),
    Architecture("squeezebert", attention="SqueezeBertSelfAttention", routed=True),
    Architecture("swin2sr", attention="Swin2SRSelfAttention", routed=True, scaling=1.0, bias=True),
    Architecture("swinv2", attention="Swinv2SelfAttention", routed=True, scaling=1.0, bias=True),
    Architecture("tapas", attention="TapasSelfAttention", routed=True, causal="is_decoder"),
    Architecture("timesformer", attention="TimesformerSelfAttention", routed=True, scaling="scale"),
    Architecture("tvp", attention="TvpAttention", routed=True),
    Architecture("vilt", attention="ViltSelfAttention", routed=True),
    Architecture("visual_bert", attention="VisualBertSelfAttention", routed=True),
    Architecture("vitdet", attention="VitDetAttention", routed=True, scaling=1.0, bias=True),
    Architecture("vits", attention="VitsAttention", routed=True, scaling=1.0, bias=True),
)
# fmt: on

DECLARATIONS: tuple[Architecture, ...] = (
    *_TABLE,
    *(architecture for family in _FAMILIES for architecture in family.ARCHITECTURES),
)
