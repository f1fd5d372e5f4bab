"""Deltas: what a run changed. They can be applied, removed, added, scaled, masked, saved and summed up."""

from luthier.delta.delta import Delta
from luthier.delta.forms import Dense, LowRank, Sparse
from luthier.delta.storage import Base
from luthier.delta.summary import summary

__all__ = ["Base", "Delta", "Dense", "LowRank", "Sparse", "summary"]
