"""A TensorBoard file without torch, whose import takes longer than a remembered answer."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_events(
    folder: Path, text: str, scalars: Mapping[str, float], figures: Mapping[str, Figure]
) -> None:
    """Write one event file into `folder`: a text called "results", numbers and pictures, all at step 0."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    values = [_text("results", text)]
    values += [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
    values += [Summary.Value(tag=name, image=_image(item)) for name, item in figures.items()]
    writer = EventFileWriter(str(folder))
    writer.add_event(Event(wall_time=time.time(), summary=Summary(value=values)))
    writer.close()


def _text(tag: str, text: str) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.plugins.text.metadata import create_summary_metadata

    tensor = TensorProto(
        dtype="DT_STRING",
        string_val=[text.encode()],
        tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
    )
    metadata = create_summary_metadata(display_name=None, description=None)
    return Summary.Value(tag=f"{tag}/text_summary", metadata=metadata, tensor=tensor)


def _image(figure: Figure) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary

    png = io.BytesIO()
    figure.savefig(png, format="png")
    width, height = (round(side * figure.dpi) for side in figure.get_size_inches())
    return Summary.Image(
        height=height, width=width, colorspace=4, encoded_image_string=png.getvalue()
    )
