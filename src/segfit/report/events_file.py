"""A TensorBoard file without torch, whose import takes longer than a remembered answer of `benchmark=plan`."""

import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_events(
    folder: Path, text: str, scalars: Mapping[str, float | None], images: Mapping[str, bytes]
) -> None:
    """Write one event file into `folder`, all at step 0: `text` as code, scalars that are not None, encoded images."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.text.metadata import create_summary_metadata
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.util.tensor_util import make_tensor_proto

    indented = "\n".join("    " + line for line in text.splitlines())
    results = Summary.Value(
        tag="results/text_summary",
        metadata=create_summary_metadata(display_name=None, description=None),
        tensor=make_tensor_proto([indented]),
    )
    values = [
        Summary.Value(tag=tag, simple_value=value)
        for tag, value in scalars.items()
        if value is not None
    ]
    values += [Summary.Value(tag=tag, image=image_of(content)) for tag, content in images.items()]
    writer = EventFileWriter(str(folder))
    writer.add_event(Event(wall_time=time.time(), summary=Summary(value=[results, *values])))
    writer.close()


def image_of(content: bytes) -> Any:
    """Return TensorBoard's image of an encoded one."""
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    with Image.open(io.BytesIO(content)) as image:
        width, height, channels = *image.size, len(image.getbands())
    return Summary.Image(
        height=height, width=width, colorspace=channels, encoded_image_string=content
    )
