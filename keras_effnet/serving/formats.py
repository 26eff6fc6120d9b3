"""The formats of images that the service refuses: their headers do not bound what decoding them takes."""

from keras_effnet.images import decoding

REFUSED = {
    "ICO": "Pillow decodes it before its pixels can be counted",
    "JPEG2000": "Pillow stops all other threads while it decodes it",
    "TIFF": "its tiles may be larger than the image",
}


def check(data: bytes) -> None:
    """Checks the format of an image before it is opened.

    Args:
        data: The file's bytes.

    Raises:
        ValueError: If the service does not read it.
    """
    name = decoding.format_of(data, REFUSED)
    if name:
        read = ", ".join(each for each in decoding.formats() if each not in REFUSED)
        told = f"{len(data)} bytes of {name}, which the service does not read: {REFUSED[name]}"
        raise ValueError(f"Expected one of {read}. Received: {told}")
