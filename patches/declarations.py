"""What of transformers' architectures cannot be read from the modules and their configs: a line where it is needed.

A model type without a line is patched by what its modules say: the classes whose forward asks transformers'
`AttentionInterface` for its attention, without cross-attention, with the sizes that they name.
"""

from ..architecture import Architecture

DECLARATIONS: tuple[Architecture, ...] = ()
