"""What SARIF 2.1.0 asks of the parts of a log that minilora writes, and nothing but these parts.

Sections 3.13 to 3.52 of the standard, as a JSON Schema: the required properties, the types, the
names that kind and level may have, and that a level goes with the kind `fail` alone (3.27.10).
"""

TEXT = {"type": "string", "minLength": 1}
BAG = {"type": "object"}


def strict(required, **properties):
    return {
        "type": "object",
        "required": list(required),
        "properties": properties,
        "additionalProperties": False,
    }


def array(items):
    return {"type": "array", "items": items}


LEVEL = {"enum": ["none", "note", "warning", "error"]}
MESSAGE = strict(["text"], text=TEXT)
RULE = strict(
    ["id"],
    id=TEXT,
    shortDescription=MESSAGE,
    defaultConfiguration=strict([], level=LEVEL),
)
LOCATION = strict(
    [],
    physicalLocation=strict(
        ["artifactLocation"],
        artifactLocation=strict(["uri"], uri=TEXT | {"format": "uri-reference"}),
    ),
    logicalLocations=array(strict([], fullyQualifiedName=TEXT)),
)
RESULT = strict(
    ["message"],
    ruleId=TEXT,
    ruleIndex={"type": "integer", "minimum": -1},
    kind={"enum": ["notApplicable", "pass", "fail", "review", "open", "informational"]},
    level=LEVEL,
    message=MESSAGE,
    locations=array(LOCATION),
    partialFingerprints={"type": "object", "additionalProperties": TEXT},
    properties=BAG,
) | {
    "if": {"properties": {"kind": {"const": "fail"}}},
    "else": {"properties": {"level": {"const": "none"}}},
}
RUN = strict(
    ["tool"],
    tool=strict(["driver"], driver=strict(["name"], name=TEXT, version=TEXT, rules=array(RULE))),
    invocations=array(
        strict(
            ["executionSuccessful"],
            executionSuccessful={"type": "boolean"},
            exitCode={"type": "integer"},
        )
    ),
    results=array(RESULT),
    properties=BAG,
)
SARIF = strict(
    ["version", "runs"],
    **{"$schema": TEXT | {"format": "uri"}},
    version={"const": "2.1.0"},
    runs=array(RUN),
)
