"""From an answer to the result of a tool: text, data and an annotated picture."""

from __future__ import annotations

import io

from mcp.server.mcpserver import Image as ImageBlock
from mcp_types import CallToolResult, ContentBlock, TextContent
from PIL import Image
from pydantic import BaseModel, Field

from molmo_edge.answer import Answer, Point
from molmo_edge.frontend.image_files import load_image
from molmo_edge.sdk.readable_text import readable
from molmo_edge.server.answers import Finished

PICTURE_SIDE = 1024  # pixels of the annotated picture: agents scale larger ones down


class PointFound(BaseModel):
    """A point in the image."""

    label: str
    x: float = Field(description="Percent of the width, from the left.")
    y: float = Field(description="Percent of the height, from the top.")
    pixel: list[float] = Field(description="[x, y] in pixels of the original image, from its top left corner.")


class Found(BaseModel):
    """What the model says about an image."""

    answer: str = Field(description="The text of the answer.")
    points: list[PointFound]
    count: int | None = Field(description="The number that the answer states, else the number of points.")
    complete: bool = Field(description="False if the answer was cut off at the limit on its length.")
    width: int = Field(description="Width of the image in pixels.")
    height: int = Field(description="Height of the image in pixels.")
    model: str = Field(description="The name of the model.")


def tool_result(answer: Finished, file: bytes, *, annotate: bool) -> CallToolResult:
    """The result of a tool. `annotate`: with a picture of the points, if there are any."""
    image = load_image(file)
    height, width = image.shape[:2]
    found = Found(
        answer=readable(answer.text).strip(),
        points=[
            PointFound(
                label=point["label"],
                x=point["x"],
                y=point["y"],
                pixel=[round(value, 1) for value in Point(point["x"], point["y"]).pixel(width, height)],
            )
            for point in answer.points
        ],
        count=answer.count,
        complete=answer.complete,
        width=width,
        height=height,
        model=answer.model,
    )
    content: list[ContentBlock] = [TextContent(type="text", text=_text(found))]
    if annotate and found.points:
        content.append(ImageBlock(data=_picture(Image.fromarray(image), found)).to_image_content())
    return CallToolResult(content=content, structured_content=found.model_dump())


def _text(found: Found) -> str:
    """For clients that pass only text on to their model."""
    lines = [found.answer or "(no text)"]
    if found.count is not None:
        lines.append(f"Count: {found.count}")
    if found.points:
        lines.append(f"Points in the image of {found.width} x {found.height} pixels:")
    lines += [
        f"{number}. {point.label or 'point'}: {point.pixel[0]:.0f}, {point.pixel[1]:.0f} px ({point.x} %, {point.y} %)"
        for number, point in enumerate(found.points, 1)
    ]
    if not found.complete:
        lines.append("The answer was cut off at the limit on its length.")
    return "\n".join(lines)


def _picture(image: Image.Image, found: Found) -> bytes:
    """The image with its points, as PNG."""
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    points = tuple(Point(point.x, point.y, point.label) for point in found.points)
    file = io.BytesIO()
    Answer("", points, image=load_image(image)).draw().save(file, "PNG", optimize=True)
    return file.getvalue()
