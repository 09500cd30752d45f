"""How the messages of a bag are decoded: by the definitions that lie in the bag, through ``rosbags`` (extra ``ros``).

``rosbags`` is pure Python and needs no ROS. It is an extra because it brings four libraries of its own (apsw, lz4,
ruamel.yaml, backports.zstd) that nothing else here uses.
"""

from __future__ import annotations

import functools
import importlib
import struct
from collections.abc import Callable
from typing import Any, Literal

from pipeline.errors import ConfigError, install
from pipeline.importing.images import Unusable

Decode = Callable[[bytes], Any]
Definition = Literal["msg", "idl", "none"]

_IDL_RULE = "=" * 80 + "\n"


def rosbags(module: str) -> Any:
    """A module of rosbags. ConfigError with the line to type where it is not installed."""
    try:
        return importlib.import_module(f"rosbags.{module}")
    except ImportError as error:
        raise ConfigError(
            f"recordings of ROS need the extra `ros`, which is not installed ({error}). {install('ros')}"
        ) from error


def full_name(type_: str) -> str:
    """``sensor_msgs/Imu`` as ``sensor_msgs/msg/Imu``, as ROS 2 writes it."""
    package, _, name = type_.partition("/")
    return f"{package}/msg/{name}" if name and "/" not in name else type_


def decoder(type_: str, kind: Definition, definition: str, ros1: bool) -> Decode:
    """Decodes messages of ``type_`` (full name), defined by the text ``definition``; Unusable for a damaged message.
    Raises Unusable if nobody knows how they are laid out."""
    store = rosbags("typesys")
    types = _typestore(type_, kind, definition)
    decode = types.deserialize_ros1 if ros1 else types.deserialize_cdr
    damaged = (rosbags("serde").SerdeError, store.TypesysError, struct.error, ValueError, IndexError, KeyError,
               TypeError, AssertionError, OverflowError, MemoryError)  # fmt: skip

    def decoded(data: bytes) -> Any:
        try:
            return decode(data, type_)
        except damaged:
            raise Unusable("damaged") from None

    return decoded


def _typestore(type_: str, kind: Definition, definition: str) -> Any:
    typesys = rosbags("typesys")
    if kind == "none":
        known = _standard_types()
        if type_ not in known.fielddefs:
            raise Unusable("the bag does not say how they are laid out, and it is no type that every ROS has")
        return known
    types = typesys.get_typestore(typesys.Stores.EMPTY)
    try:
        if kind == "msg":
            types.register(typesys.get_types_from_msg(definition, type_))
        for part in _idl_parts(definition) if kind == "idl" else ():
            types.register(typesys.get_types_from_idl(part))
        types.get_msgdef(type_)
    except (typesys.TypesysError, KeyError, ValueError, TypeError, AssertionError) as error:
        said = " ".join(str(error).split())[:200] or repr(error)
        raise Unusable(f"their definition cannot be read ({said})") from None
    return types


@functools.cache
def _standard_types() -> Any:
    typesys = rosbags("typesys")
    return typesys.get_typestore(typesys.Stores.LATEST)


def _idl_parts(definition: str) -> list[str]:
    if not definition.startswith(f"{_IDL_RULE}IDL: "):
        return [definition]
    return [part.split("\n", 1)[1] for part in definition.split(_IDL_RULE)[1:]]
