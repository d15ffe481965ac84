"""All mutants, each with the tests that must detect it. ``run.py`` applies them to copies of the repository."""

from mutant import ROOT, Edit, Mutant
from process_mutants import PROCESS_MUTANTS
from system_mutants import SYSTEM_MUTANTS

__all__ = ["MUTANTS", "ROOT", "Edit", "Mutant"]

MUTANTS: tuple[Mutant, ...] = (*PROCESS_MUTANTS, *SYSTEM_MUTANTS)
