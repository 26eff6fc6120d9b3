"""Reads protocol buffers by the numbers of their fields. Needs no library and no schema."""

from typing import Any


def varint(data: bytes, place: int) -> tuple[int, int]:
    """Reads a number of variable length.

    Args:
        data: Bytes.
        place: Integer, where the number starts.

    Returns:
        Tuple of the number and the place after it.

    Raises:
        ValueError: If the number does not end.
        IndexError: If the data end before.
    """
    value = 0
    for shift in range(0, 64, 7):
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("a number does not end")


def fields(message: bytes) -> dict[int, list]:
    """Reads one message, without those in it.

    Args:
        message: Bytes.

    Returns:
        Dict from the number of a field to the list of its values: integers, or bytes for strings and messages.

    Raises:
        ValueError: If it is no message.
        IndexError: If it is cut short.
    """
    if not isinstance(message, bytes):  # a number, where the schema has a message
        raise ValueError("it contains a message of another kind")
    found: dict[int, list] = {}
    place = 0
    while place < len(message):
        tag, place = varint(message, place)
        if tag & 7 == 0:
            value, place = varint(message, place)
            value = value - (1 << 64) if value >> 63 else value
        elif tag & 7 in (1, 5):
            width = 8 if tag & 7 == 1 else 4
            value, place = int.from_bytes(message[place : place + width], "little"), place + width
        elif tag & 7 == 2:
            length, place = varint(message, place)
            value, place = message[place : place + length], place + length
        else:
            raise ValueError("it contains an invalid message")
        if place > len(message):
            raise ValueError("a message in it is cut short")
        found.setdefault(tag >> 3, []).append(value)
    return found


def one(of: dict[int, list], number: int, default: Any = 0) -> Any:
    """Returns the value of a field that a message has at most once.

    Args:
        of: See `fields()`.
        number: Integer, the field's number.
        default: The value where the message lacks the field. Its type is the expected one. Defaults to 0.

    Returns:
        The value.

    Raises:
        ValueError: If the value is of another type.
    """
    value = of.get(number, [default])[-1]
    if type(value) is not type(default):
        raise ValueError("it contains a message of another kind")
    return value
