"""Writes what the documentation says of each family: `python -m tests.families`."""

from __future__ import annotations

import json

from tests.families.configurations import FAMILIES, READING_IMAGES
from tests.families.test_families import FACTS
from tests.families.trying import facts

lines = [f"{json.dumps(family)}: {json.dumps(facts(family))}" for family in (*FAMILIES, *READING_IMAGES)]
FACTS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
