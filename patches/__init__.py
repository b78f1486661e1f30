"""What is particular to architectures."""

from .declarations import DECLARATIONS

__all__ = ["DECLARATIONS"]
