"""Writes what the documentation says of each family: `python -m tests.families`."""

from __future__ import annotations

import json

from tests.families.configurations import FAMILIES, READING_IMAGES
from tests.families.test_families import FACTS
from tests.families.trying import facts

FACTS.write_text(json.dumps({family: facts(family) for family in (*FAMILIES, *READING_IMAGES)}, indent=1) + "\n", encoding="utf-8")
