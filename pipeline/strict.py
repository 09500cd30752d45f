"""Strict YAML: a file decoded into frozen structs, or one ``ConfigError`` that says where, what and what instead, of
everything that is wrong in it.

PyYAML's own tree of nodes is kept beside the values, because it knows the line of every key; msgspec knows the types.
Neither alone can tell a user which line of which file to change: msgspec drops dictionary keys from its error path,
and PyYAML knows no types. A struct may collect the keys that it does not know itself in the field named by its class
attribute ``REST`` (a source's own settings, which only the source's class can check).
"""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
import yaml

from pipeline.errors import ConfigError, Noted, SensoriumError, Together, absent, closest, joined, typed
from pipeline.errors import listed as listed
from pipeline.errors import nearest as nearest

T = TypeVar("T")
K = TypeVar("K", str, int)
E = TypeVar("E", bound=SensoriumError)
Where = tuple[str | int, ...]

UNITS: dict[str, tuple[str, float]] = {
    "ns": ("time", 1e-9), "us": ("time", 1e-6), "ms": ("time", 1e-3), "s": ("time", 1.0), "min": ("time", 60.0),
    "hz": ("rate", 1.0), "khz": ("rate", 1e3), "fps": ("rate", 1.0), "rpm": ("rate", 1 / 60),
    "mm": ("length", 1e-3), "cm": ("length", 1e-2), "m": ("length", 1.0),
    "deg": ("angle", 0.017453292519943295), "rad": ("angle", 1.0),
    "bytes": ("size", 1.0), "kib": ("size", 1024.0), "mib": ("size", 1048576.0), "gib": ("size", 1073741824.0),
}  # fmt: skip
"""Units that key names end in: dimension, and how many of the dimension's base unit."""


_MCAP = b"\x89MCAP"
"""How a recording begins, which is easily named in place of a YAML file."""


NUMBER = "number"
"""Under what the ``extra`` of a text's ``Meta`` has a sentence for who writes a number, which is its ``{}``."""


MOST_VALUES = 100_000
"""So many values may aliases (*name) make of a text that is shorter: a few lines can stand for millions."""

_IN_YAML = {
    "another document": "a second document begins here, and a file holds one; leave out the other, or the `---`.",
    r"character '\t'": "a tab stands here, which cannot be read before a value; write spaces.",
}
"""What is to be said of what PyYAML has words for that help nobody."""


class _Loader(yaml.SafeLoader):
    """YAML without the readings that surprise: 1:30 is no number of seconds, 010 no eight, 2024-01-01 no date."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.rsplit(":", 1)[1] not in ("int", "float", "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"),
                              list("-+0123456789"))  # fmt: skip
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|\.[0-9]+([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
               r"|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)  # fmt: skip


class Document:
    """One YAML file: its values, and the line of each. ``decode`` turns it, or a part of it, into a struct."""

    def __init__(self, text: str, path: Path | str) -> None:
        """Parses ``text``; ``path`` is only named in errors. Raises ConfigError."""
        self.path, self.text = Path(path), text
        self._lines: dict[Where, int] = {}
        self._written: dict[Where, str] = {}
        self._built = 0
        keys = Together()  # what is wrong with keys, before anybody knows what they mean
        value = self._parse(keys)
        if keys.found:
            keys.settled(value)
        self.value = value

    @classmethod
    def load(cls, path: Path | str) -> Document:
        """The document in the file ``path``. Raises ConfigError, also when there is no such file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise absent(Path(path), ".yaml") from None
        except UnicodeDecodeError as error:
            if error.object.startswith(_MCAP):
                said = f"this is a recording and no YAML file; what it holds says: sensorium info {typed(path)}"
            else:
                said = "this is no text, so it cannot be read as YAML; name a text file in UTF-8."
            raise ConfigError(f"{path}: {said}") from None
        except OSError as error:
            raise ConfigError(f"{path}: the file cannot be read: {error.strerror}.") from None
        return cls(text, path)

    @property
    def folder(self) -> Path:
        """What relative paths in it are relative to: where the file lies; of what is no regular file (a pipe, say) the
        folder of whoever named it."""
        lies = self.path.is_file() or not self.path.exists()
        return self.path.resolve().parent if lies else Path.cwd()

    def decode(self, type_: type[T], at: Where = (), value: Any = ..., extra: Iterable[str] = ()) -> T:
        """The value at path ``at`` (or ``value`` in its place) as ``type_``. ``extra`` are keys that are also allowed
        there, named when a key is unknown. Raises ConfigError, which says everything that is wrong."""
        found, wrong = self.read(type_, at, value, extra)
        if wrong.found:
            wrong.settled(found)
        return typing.cast(T, found)

    def read(
        self, type_: type[T], at: Where = (), value: Any = ..., extra: Iterable[str] = ()
    ) -> tuple[T | None, Together]:
        """As ``decode``, but beside what is wrong there is what can be read in spite of it: what is wrong is left out,
        so that keys have their defaults. None where something needed is wrong."""
        wrong, found = Together(), None
        with wrong:
            found = self._convert(self._get(at) if value is ... else value, type_, at, wrong, tuple(extra))
        return found, wrong

    def error(self, at: Where, what: str) -> ConfigError:
        """A ConfigError about the value at path ``at``: file, line, path, ``what``."""
        return self.fault(ConfigError, at, what)

    def fault(self, kind: type[E], at: Where, what: str) -> E:
        """The same as another error, where the fault is no user's."""
        error = kind(f"{self.place(at)}: {what}")
        error.line = self._line(at) or 0
        return error

    def place(self, at: Where) -> str:
        """Where ``at`` is: file, line if known, dotted path."""
        known, parts = self._line(at), [str(self.path)]
        if known is not None:
            parts.append(f"line {known}")
        if at:
            parts.append(dotted(at))
        return ", ".join(parts)

    def _line(self, at: Where) -> int | None:
        return next((self._lines[at[:n]] for n in range(len(at), 0, -1) if at[:n] in self._lines), None)

    def numbers(self) -> Iterator[tuple[Where, int | float]]:
        """Every number under a key, and its path."""
        return ((at, number) for at, number in _numbers(self.value, ()) if at and isinstance(at[-1], str))

    # -- reading YAML ------------------------------------------------------------------------------------------------

    def _parse(self, wrong: Together) -> Any:
        for number, line in enumerate(self.text.splitlines(), 1):
            if "\t" in line[: len(line) - len(line.lstrip())]:
                raise ConfigError(
                    f"{self.path}, line {number}: the line is indented with a tab, which YAML does not allow; "
                    "indent with spaces."
                )
        try:
            loader = _Loader(self.text)
            node = loader.get_single_node()
            return None if node is None else self._build(loader, node, (), (), wrong)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line_text = f", line {mark.line + 1}" if mark else ""
            why = error.problem or error.context or "it cannot be parsed"
            for word, said in _IN_YAML.items():
                if word in why:
                    raise ConfigError(f"{self.path}{line_text}: {said}") from None
            raise ConfigError(f"{self.path}{line_text}: this is no valid YAML: {why}. Check the indentation, the "
                              "colons and the quotes of this line and of the one above.") from None  # fmt: skip
        except RecursionError:
            raise ConfigError(f"{self.path}: it is nested too deeply; is this the file meant?") from None
        except (yaml.YAMLError, ValueError) as error:
            why = " ".join(str(error).split())
            raise ConfigError(f"{self.path}: this is no valid YAML: {why}.") from None

    def _build(self, loader: Any, node: yaml.Node, at: Where, above: tuple[yaml.Node, ...], wrong: Together) -> Any:
        """The value of ``node``, whose lines are noted under the path ``at``."""
        self._lines.setdefault(at, node.start_mark.line + 1)
        self._built += 1
        if self._built > max(len(self.text), MOST_VALUES):
            raise yaml.YAMLError(f"its aliases (*name) stand for more than {MOST_VALUES} values; write them out")
        if node in above:
            raise self.error(at, "an alias (*name) refers to the mapping or list that it stands in; write it out.")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(loader, node, at, (*above, node), wrong)
        if isinstance(node, yaml.SequenceNode):
            return [self._build(loader, item, (*at, i), (*above, node), wrong) for i, item in enumerate(node.value)]
        self._written[at] = node.value
        return loader.construct_object(node, deep=True)

    def _mapping(
        self, loader: Any, node: yaml.MappingNode, at: Where, above: tuple[yaml.Node, ...], wrong: Together
    ) -> dict[str, Any]:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{self.path}, line {line}: a list or a mapping stands where a key must be, which is "
                                  "text; put what has braces or brackets of its own in quotes.")  # fmt: skip
            if key_node.value in seen and key_node.tag != "tag:yaml.org,2002:merge":
                self._lines[(*at, key_node.value)] = line
                wrong.add(self.error((*at, key_node.value), f"the key `{key_node.value}` stands here twice, first in "
                                     f"line {seen[key_node.value]}; keep one of them."))  # fmt: skip
            seen.setdefault(str(key_node.value), line)
        loader.flatten_mapping(node)  # anchors merged with <<: come first, so that a mapping's own keys win
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            self._lines[(*at, key)] = key_node.start_mark.line + 1
            if key_node.tag != "tag:yaml.org,2002:str":
                wrong.add(self.error((*at, key), f"a key must be text, but YAML reads `{key}` as something else; put "
                                     f"it in quotes: \"{key}\"."))  # fmt: skip
                continue
            with wrong:
                result[key] = self._build(loader, value_node, (*at, key), above, wrong)
        return result

    def _get(self, at: Where) -> Any:
        value = self.value
        for key in at:
            value = value[key]
        return value

    # -- checking types ----------------------------------------------------------------------------------------------

    # Each raises what is wrong with ``value`` itself, and notes in ``wrong`` what is wrong in its parts.

    def _convert(self, value: Any, type_: Any, at: Where, wrong: Together, extra: tuple[str, ...] = ()) -> Any:
        origin, args = get_origin(type_), get_args(type_)
        if origin is Annotated and _is_struct(args[0]):
            type_, origin, args = args[0], get_origin(args[0]), get_args(args[0])
        if origin in (Union, types.UnionType):
            return self._union(value, type_, args, at, wrong)
        if _is_struct(type_):
            return self._struct(value, type_, at, wrong, extra)
        if origin is dict and args[0] is str:
            if not isinstance(value, dict):
                raise self._wrong(value, "a mapping of names to values", at)
            return dict(self._each(value.items(), args[1], at, wrong))
        if origin in (list, tuple) and (origin is list or args[-1] is ...):
            if not isinstance(value, list):
                raise self._wrong(value, "a list, like [a, b]", at)
            return origin(item for _, item in self._each(enumerate(value), args[0], at, wrong))
        return self._leaf(value, type_, at)

    def _each(self, items: Iterable[tuple[K, Any]], type_: Any, at: Where, wrong: Together) -> Iterator[tuple[K, Any]]:
        """``items`` by their keys, without those that are wrong."""
        for key, item in items:
            try:
                found = self._convert(item, type_, (*at, key), wrong)
            except ConfigError as error:
                wrong.add(error)
            else:
                yield key, found

    def _union(self, value: Any, type_: Any, args: tuple[Any, ...], at: Where, wrong: Together) -> Any:
        if value is None and type(None) in args:
            return None
        others = [a for a in args if a is not type(None)]
        if len(others) == 1:
            return self._convert(value, others[0], at, wrong)
        structs = [a for a in args if _is_struct(a)]
        if not isinstance(value, dict) or not structs:
            return self._leaf(value, type_, at)
        if len(structs) == 1:
            return self._struct(value, structs[0], at, wrong, ())
        field = structs[0].__struct_config__.tag_field
        tags = {s.__struct_config__.tag: s for s in structs}
        tag = value.get(field)
        if not isinstance(tag, str) or tag not in tags:
            stated = f"`{field}: {tag}`" if field in value else f"no `{field}`"
            place = (*at, field) if field in value else at
            raise self.error(place, f"found {stated}, allowed are {listed(tags)}.{nearest(tag, tags)}")
        rest = {k: v for k, v in value.items() if k != field}
        return self._struct(rest, tags[tag], at, wrong, (field,))

    def _struct(self, value: Any, type_: Any, at: Where, wrong: Together, extra: tuple[str, ...]) -> Any:
        if not isinstance(value, dict):
            raise self._wrong(value, describe(type_), at, _written_out(value, type_, at))
        known = {field.encode_name: field for field in _written_fields(type_)}
        rest_field: str | None = getattr(type_, "REST", None)
        hints = get_type_hints(type_, include_extras=True)
        before, others = len(wrong.found), [key for key in value if key not in known and key not in extra]
        kept: dict[str, Any] = {}
        for key, item in value.items():
            with wrong:
                if key in known:
                    kept[known[key].name] = self._convert(item, hints[known[key].name], (*at, key), wrong)
                elif key in others and rest_field is None:
                    raise self._unknown(key, item, [*known, *extra], (*at, key))
        meant = {_meant(key, [*known, *extra]) for key in others} if rest_field is None else set()
        missing = [name for name, field in known.items() if field.required and field.name not in kept]
        for name in missing:
            if name not in value and name not in meant:  # else it is said already
                close = closest(name, others) if rest_field is not None else None
                hint = f" Is `{close}` meant to be it?" if close else ""
                what = f"the key `{name}` is missing; it needs {describe(hints[known[name].name])}.{hint}"
                wrong.add(self.error(at, what))
        if missing:
            raise Noted
        if rest_field is not None:
            kept[rest_field] = {key: value[key] for key in others}
        try:
            return type_(**kept)
        except (ValueError, TypeError) as error:  # what a struct's __post_init__ says of its fields together
            if len(wrong.found) > before:  # which may be so because one of them was left out
                raise Noted from None
            raise self.error(at, str(error)) from None

    def _leaf(self, value: Any, type_: Any, at: Where) -> Any:
        endless = {where: number for where, number in _numbers(value, at) if not math.isfinite(number)}
        if endless:  # also somewhere in what may be anything
            expected = describe(type_) if at in endless and type_ is not Any else "a finite number"
            raise joined([self._wrong(number, expected, where) for where, number in endless.items()])
        try:
            return msgspec.convert(value, type_, dec_hook=self._path)
        except msgspec.ValidationError:
            raise self._wrong(value, describe(type_), at, _of_number(type_, value)) from None

    def _path(self, type_: Any, value: Any) -> Any:
        """A ``Path`` of a struct: relative ones are relative to the document's folder."""
        if type_ is not Path or not isinstance(value, str):
            raise ValueError(f"expected {describe(type_)}")
        path = Path(value).expanduser()
        return path if path.is_absolute() else (self.folder / path).resolve()

    def _unknown(self, key: str, value: Any, known: list[str], at: Where) -> ConfigError:
        allowed = f"Allowed here: {listed(sorted(known))}." if known else "No keys are allowed here."
        return self.error(
            at, f"`{key}` is no key here.{_unit_hint(key, value, known) or nearest(key, known)} {allowed}"
        )

    def _wrong(self, value: Any, expected: str, at: Where, hint: str = "") -> ConfigError:
        written = self._written.get(at)
        if isinstance(value, bool) and written is not None and written.lower() not in ("true", "false"):
            hint = f' YAML reads {written} without quotes as {str(value).lower()}; write "{written}" if you mean text.'
        elif isinstance(value, str) and (number := re.fullmatch(r"\s*(-?[0-9]*\.?[0-9]+)\s*([a-zA-Z]+)\s*", value)):
            alone = _in_unit_of(str((at or ("",))[-1]), number[1], number[2].lower())
            hint = f" The unit stands in the key's name; write the number alone{alone}."
        elif isinstance(value, str) and "number" in expected and re.fullmatch(r"-?[0-9.]+", value):
            hint = f" Write it without quotes: {value}."
        elif written is not None and expected.startswith(("text", "a path")) and isinstance(value, int | float):
            hint = hint or f' YAML reads it as a number; write "{written}" if you mean text.'
        elif isinstance(value, float) and not math.isfinite(value):
            hint = " Write a finite number." if "number" in expected and "finite" not in expected else ""
        elif isinstance(value, float) and 0 < value < 1e9 and str((at or ("",))[-1]).endswith("_ms"):
            hint = f" The unit is milliseconds: {value:g} s is {round(value * 1000) or 1}."
        return self.error(at, f"found {found(value)}, expected {expected}.{hint}")


def load_yaml(path: Path | str, type_: type[T]) -> T:
    """The file ``path`` as ``type_``, a struct. Raises ConfigError."""
    return Document.load(path).decode(type_)


def fields(type_: Any) -> tuple[Any, ...]:
    """The fields of a struct."""
    return msgspec.structs.fields(type_)


def found(value: Any) -> str:
    """``value`` in words, for an error."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return f"{str(value).lower()} (yes or no)"
    kind = {str: "text", int: "a whole number", float: "a number", list: "a list", dict: "a mapping"}
    shown = repr(value) if isinstance(value, str) else str(value)
    return f"{shown[:60]}{'…' if len(shown) > 60 else ''} ({kind.get(type(value), type(value).__name__)})"


def describe(type_: Any) -> str:
    """A type in words, for an error."""
    origin, args = get_origin(type_), get_args(type_)
    if origin is Annotated:
        return describe(args[0]) + "".join(_limits(meta) for meta in args[1:] if isinstance(meta, msgspec.Meta))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin is typing.Literal:
        return "one of " + listed(args)
    if _is_struct(type_):
        return f"a mapping with the keys {listed(f.encode_name for f in _written_fields(type_))}"
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    names = {dict: "a mapping", list: "a list", tuple: "a list", Path: "a path"}
    return str(words.get(type_) or names.get(origin or type_) or getattr(type_, "__name__", type_))


def _of_number(type_: Any, value: Any) -> str:
    """What a number is told where a text is needed that is none in whatever quotes: the ``NUMBER`` of its type."""
    if not isinstance(value, int) or isinstance(value, bool):
        return ""
    extra = next((meta.extra for meta in get_args(type_)[1:] if isinstance(meta, msgspec.Meta) and meta.extra), {})
    return f" {extra[NUMBER].format(value)}" if NUMBER in extra else ""


def dotted(at: Where) -> str:
    """A path as a user reads it: ``sources.camera.rate_hz``."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in at).lstrip(".")


def _numbers(value: Any, at: Where) -> Iterator[tuple[Where, int | float]]:
    """Every number in ``value``, which stands at ``at``, and where it stands."""
    rest: list[tuple[Where, Any]] = [(at, value)]
    while rest:
        at, value = rest.pop(0)
        if isinstance(value, dict):
            rest += [((*at, key), item) for key, item in value.items()]
        elif isinstance(value, list):
            rest += [((*at, index), item) for index, item in enumerate(value)]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield at, value


def _limits(meta: msgspec.Meta) -> str:
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than", "pattern": "matching",
             "min_length": "of a length of at least", "max_length": "of a length of at most"}  # fmt: skip
    said = "".join(f" {word} {getattr(meta, key)}" for key, word in words.items() if getattr(meta, key) is not None)
    said = re.sub(r"((?:at least|more than) \S+) (at most|less than)", r"\1 and \2", said)
    return said + (f", like `{meta.examples[0]}`" if meta.examples else "")


def _is_struct(type_: Any) -> bool:
    return isinstance(type_, type) and issubclass(type_, msgspec.Struct)


def _written_fields(type_: Any) -> list[Any]:
    """The fields that are keys. What collects all other keys is none: it is never written itself."""
    return [field for field in fields(type_) if field.name != getattr(type_, "REST", None)]


def _written_out(value: Any, type_: Any, at: Where) -> str:
    """The mapping that a single word stands for, where only one text is needed: ``imu: synthetic``."""
    needed = [field for field in _written_fields(type_) if field.required]
    if not isinstance(value, str) or not at or len(needed) != 1 or needed[0].type is not str:
        return ""
    return f" Write it out: `{at[-1]}: {{{needed[0].encode_name}: {value}}}`."


def _meant(key: str, known: list[str]) -> str | None:
    """The key that a user who wrote ``key`` is told to write."""
    return _with_unit(key, known) or closest(key, known)


def _with_unit(key: str, known: list[str]) -> str | None:
    """The key of the same quantity in another unit: ``hop_ms`` for ``hop_s``, and for ``hop``; the only one for a bare
    unit, as ``rate_hz`` for ``fps``."""
    stem, unit = _unit_of(key)
    if not stem:
        same = [name for name in known if (other := _unit_of(name)[1]) and UNITS[other][0] == UNITS[unit][0]]
        return same[0] if len(same) == 1 else None
    for name in known:
        other_stem, other = _unit_of(name)
        if other and other_stem == stem and (not unit or UNITS[unit][0] == UNITS[other][0]):
            return name
    return None


def _unit_of(key: str) -> tuple[str, str]:
    stem, _, unit = key.rpartition("_")
    return (stem, unit) if unit in UNITS else (key, "")


def _in_unit_of(key: str, number: str, unit: str) -> str:
    """``, in ms: 250`` for ``0.25`` ``s`` at ``max_delay_ms``; without a number if that is no unit of the same kind."""
    wanted = _unit_of(key)[1]
    if wanted in ("", unit):
        return f": {number}"
    if unit not in UNITS or UNITS[unit][0] != UNITS[wanted][0]:
        return f", in {wanted}"
    return f", in {wanted}: {round(float(number) * UNITS[unit][1] / UNITS[wanted][1], 9):g}"


def _unit_hint(key: str, value: Any, known: list[str]) -> str:
    """The same quantity in another unit, converted: ``hop_s: 0.1`` where ``hop_ms`` is the key."""
    name, unit = _with_unit(key, known), _unit_of(key)[1]
    if name is None:
        return ""
    if not unit:
        return f" Units stand in the names: write `{name}`."
    if isinstance(value, int | float):
        ratio = UNITS[unit][1] / UNITS[_unit_of(name)[1]][1]
        return f" The key is `{name}`: write `{name}: {round(value * ratio, 9):g}`."
    return f" The key is `{name}`."
