"""Which fields of KubeRay's RayJob we use, and of what type they are: `python -m tests.kuberay_fields CRD.yaml` prints
them from the schema that KubeRay publishes (helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml of its repository).

What it printed for one version lies beside the test, so that no copy of the schema is kept here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from launcher.kuberay import Worker, manifest

FULL = manifest("tiny", ["python"], (1, 2), Worker("image", 8, 8, "64Gi", ("runs", "/runs")), "2.60.0")
"""A manifest with every field that can be in one."""
Node = dict[str, Any]


def of_schema(schema: Node, value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every field of a value, and the type that the schema gives it. Raises KeyError for one that is not there."""
    kind = schema.get("type") or ("int-or-string" if schema.get("x-kubernetes-int-or-string") else "any")
    if isinstance(value, dict) and ("properties" in schema or "additionalProperties" in schema):
        missing = set(schema.get("required", ())) - set(value)
        if missing:
            raise KeyError(f"{path} lacks {', '.join(missing)}")
        for key, inner in value.items():
            known = schema.get("properties", {})
            below, step = (known[key], key) if key in known else (schema["additionalProperties"], "*")
            yield from of_schema(below, inner, f"{path}.{step}" if path else step)
    elif isinstance(value, list):
        for inner in value:
            yield from of_schema(schema["items"], inner, f"{path}[]")
    elif not isinstance(value, dict) or kind == "object":
        yield path, "|".join(map(str, schema["enum"])) if "enum" in schema else kind


def main(crd: str) -> None:
    """Print the fields of our fullest manifest."""
    versions = yaml.safe_load(Path(crd).read_text())["spec"]["versions"]
    schema = next(each for each in versions if each["name"] == "v1")["schema"]["openAPIV3Schema"]
    print(yaml.safe_dump(dict(of_schema(schema, yaml.safe_load(FULL)))), end="")


if __name__ == "__main__":
    main(sys.argv[1])
