"""What of transformers' architectures cannot be read from the modules and their configs: a line where it is needed.

A model type without a line is patched by what its modules say: the classes whose forward asks transformers'
`AttentionInterface` for its attention, without cross-attention, with the sizes that they name.
"""

from ..architecture import Architecture
from . import bloom, codegen, deberta_v2, falcon, gpt_neo, gptj, mpt, rembert, roformer, xlm

# Attention off the interface that has something to say of its own: one file a family
_FAMILIES = (bloom, codegen, deberta_v2, falcon, gpt_neo, gptj, mpt, rembert, roformer, xlm)

DECLARATIONS: tuple[Architecture, ...] = tuple(
    architecture for family in _FAMILIES for architecture in family.ARCHITECTURES
)
