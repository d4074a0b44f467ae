"""One C struct: its layout, its size and the record that holds its fields.

A ``Codec`` joins a ``struct`` format to a NamedTuple. Padding is written as ``x`` in the format, so
that records hold only fields that mean something. Records are tuples because building one is a
single C call (0.3 us for a ``fuse_attr``; a frozen dataclass takes 2.5).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from vfsmount.errors import WireError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Codec", "NestedCodec"]

R = TypeVar("R", bound=tuple[object, ...])


class Codec(Generic[R]):
    """Encode and decode one C struct.

    Args:
        record: NamedTuple class whose fields are those of the format, in order.
        layout: ``struct`` format with explicit byte order and padding.

    Attributes:
        size: Bytes of the struct on the wire.
        name: Name of the record class, for messages.
        values_into: ``values_into(buffer, offset, *fields)``, the record-less form for hot paths.
    """

    __slots__ = ("_make", "_struct", "name", "size", "values_into")

    def __init__(self, record: type[R], layout: str) -> None:
        self._struct = struct.Struct(layout)
        self._make: Any = cast("Any", record)._make
        self.name = record.__name__
        self.size = self._struct.size
        self.values_into = self._struct.pack_into

    def __repr__(self) -> str:
        return f"<Codec {self.name}, {self.size} bytes>"

    def pack(self, record: R) -> bytes:
        """Return the struct as ``size`` bytes; a field out of range is a ``struct.error``."""
        return self._struct.pack(*record)

    def values(self, *fields: int | bytes) -> bytes:
        """Return the struct as ``size`` bytes from bare fields."""
        return self._struct.pack(*fields)

    def unpack(self, buffer: Buffer, offset: int = 0) -> R:
        """Read the struct at ``offset``; bytes behind it are the caller's business.

        Raises:
            WireError: Fewer than ``size`` bytes are left.
        """
        try:
            fields = self._struct.unpack_from(buffer, offset)
        except struct.error:
            raise self._too_short(buffer, offset) from None
        return cast("R", self._make(fields))

    def _too_short(self, buffer: Buffer, offset: int) -> WireError:
        left = max(memoryview(buffer).nbytes - offset, 0)
        return WireError(f"{self.name} needs {self.size} bytes, {left} are left")


class NestedCodec(Codec[R]):
    """A struct whose last field is another struct's record.

    Args:
        record: NamedTuple class; its last field is a record of ``inner``.
        head: ``struct`` format, with byte order, of the fields before it.
        inner: Codec of the last field.
        inner_layout: Format of ``inner`` without byte order.
    """

    __slots__ = ("_head", "_inner_make")

    def __init__(
        self, record: type[R], head: str, inner: type[tuple[object, ...]], inner_layout: str
    ) -> None:
        super().__init__(record, head + inner_layout)
        self._head = len(cast("Any", record)._fields) - 1
        self._inner_make: Any = cast("Any", inner)._make

    def pack(self, record: R) -> bytes:
        """Return the struct as ``size`` bytes."""
        return self._struct.pack(*record[:-1], *cast("tuple[int, ...]", record[-1]))

    def unpack(self, buffer: Buffer, offset: int = 0) -> R:
        """Read the struct at ``offset``.

        Raises:
            WireError: Fewer than ``size`` bytes are left.
        """
        try:
            fields = self._struct.unpack_from(buffer, offset)
        except struct.error:
            raise self._too_short(buffer, offset) from None
        head = self._head
        return cast("R", self._make((*fields[:head], self._inner_make(fields[head:]))))
