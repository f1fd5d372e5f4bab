"""Recipes of other tools as recipes of luthier: Axolotl, LLaMA-Factory, and the scripts of TRL."""

from luthier.convert.convert import TOOLS, Converted, convert

__all__ = ["TOOLS", "Converted", "convert"]
