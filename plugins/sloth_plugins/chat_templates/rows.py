"""Rows of other shapes: ``from``/``value`` messages with roles of other names, as ShareGPT has them.

The template itself reads them: what is written before it turns each row into a message with a known role. So every
host that renders the template, at training and afterwards, takes both kinds of rows, and a role that nobody maps is an
error and not a turn that no one trains on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from sloth_backend.config import SlothConfigError
from sloth_plugins.chat_templates.formats import Format

KEYS = ("role", "content")
"""What a message's fields are called when nothing is mapped."""


def check(mapping: Mapping[str, str], style: Format) -> None:
    """Refuse a mapping that cannot be meant.

    Args:
        mapping: what the rows call a field (``role``, ``content``) or a role (``user``, ``assistant``...).
        style: the chat format, which knows the roles.

    Raises:
        SlothConfigError: unknown fields or roles, names that are no text, or one name for two of them.
    """
    known = (*KEYS, *style.roles)
    problems = [
        f"mapping names {key!r}; it may name {', '.join(known)}, as in {{'role': 'from', 'user': 'human'}}"
        for key in mapping
        if key not in known
    ]
    problems += [
        f"mapping gives {key!r} the name {value!r}: expected a text"
        for key, value in mapping.items()
        if not isinstance(value, str) or not value
    ]
    for group in (KEYS, style.roles):
        names = [mapping.get(key, key) for key in group]
        twice = sorted({str(name) for name in names if names.count(name) > 1})
        problems += [f"mapping gives the name {name!r} to two of {', '.join(group)}" for name in twice]
    if problems:
        raise SlothConfigError(problems)


def reader(mapping: Mapping[str, str], style: Format) -> str:
    """Jinja that stands before a template and gives every row of ``messages`` its usual fields and role."""
    names = {mapping[key]: key for key in style.roles if key in mapping}
    return _READER.format(
        tools="" if style.knows_tools else _NO_TOOLS.format(name=style.name),
        role=_field("role", mapping),
        content=_field("content", mapping),
        names=json.dumps(names),
        roles=json.dumps(style.roles),
        name=style.name,
    )


def _field(key: str, mapping: Mapping[str, str]) -> str:
    """The field of ``row`` under its mapped name, or under its usual one: hosts may have renamed it already."""
    if mapping.get(key, key) == key:
        return f"row['{key}']"
    other = f"row[{json.dumps(mapping[key])}]"
    return f"({other} if {other} is defined and {other} is not none else row['{key}'])"


_NO_TOOLS = (
    "{{%- if tools %}}{{{{- raise_exception('The chat template {name} describes no tools: take llama-3.1 or"
    " qwen-2.5.') }}}}{{%- endif %}}\n"
)
_READER = """{tools}{{%- set names, rows = {names}, namespace(all=[]) %}}
{{%- for row in messages %}}
    {{%- set role = {role} %}}
    {{%- set role = names.get(role, role) %}}
    {{%- if role not in {roles} %}}
        {{{{- raise_exception('The chat template {name} knows no role ' ~ role ~ ': mapping= is for other names.') }}}}
    {{%- endif %}}
    {{%- set rows.all = rows.all + [dict(row, role=role, content={content})] %}}
{{%- endfor %}}
{{%- set messages = rows.all %}}
"""
